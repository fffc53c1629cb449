"""The small vision encoder's text side, regions and loss."""

import pytest
import torch

from illume_lightning.nn.contrastive import ImageTextModel, Region, TextEncoder
from illume_lightning.nn.semantic import QwenVisionTower


@pytest.fixture
def model() -> ImageTextModel:
    torch.manual_seed(0)
    return ImageTextModel(QwenVisionTower(1, 32, 2, 48), TextEncoder(32, 1, 2, embed_dim=24)).eval()


def test_texts_are_embedded_alone_as_in_a_batch(model: ImageTextModel) -> None:
    texts = ["a red star", "", "a small blue circle at the top left and nothing else", "RED a Star!"]
    together = model.text(texts)
    alone = torch.cat([model.text([text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    assert (together[0] - together[3]).norm() > 1e-4, "word order must matter"


def test_long_texts_are_cut(model: ImageTextModel) -> None:
    words = " ".join(f"word{i}" for i in range(100))
    kept = " ".join(f"word{i}" for i in range(48))
    torch.testing.assert_close(model.text([words]), model.text([kept]))


def test_a_region_is_the_mean_of_its_cells(model: ImageTextModel) -> None:
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    features = model.tower.features(images)
    assert features.shape == (2, 48, 4, 4)
    _, parts = model.embed_images(images, [Region(1, "", 0.0, 0.5, 0.5, 1.0)])
    expected = model.project(features[1, :, :2, 2:].mean((1, 2)))
    torch.testing.assert_close(parts[0], torch.nn.functional.normalize(expected, dim=-1))


def test_equal_texts_are_positives(model: ImageTextModel) -> None:
    texts = ["a red star", "a red star", "a blue circle"]
    vectors = model.text(texts).detach()
    right = model.loss(vectors, texts)
    wrong = model.loss(vectors, ["a red star", "another", "a blue circle"])
    assert right < wrong


def test_it_learns_a_tiny_problem(model: ImageTextModel) -> None:
    """Two colours at two places: after some steps each picture finds its caption, and each region its phrase."""
    images, captions, regions = [], [], []
    for colour, value in (("red", 0), ("blue", 2)):
        for side, (left, right) in (("left", (0.0, 0.5)), ("right", (0.5, 1.0))):
            image = torch.full((3, 56, 56), -0.5)
            image[value, :, int(56 * left) : int(56 * right)] = 1.0
            phrase = f"{colour} on the {side}"
            regions.append(Region(len(images), phrase, 0.0, left, 1.0, right))
            images.append(image)
            captions.append(phrase)
    batch = torch.stack(images)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(300):
        whole, parts = model.embed_images(batch, regions)
        loss = model.loss(whole, captions) + model.loss(parts, [region.phrase for region in regions])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole, _ = model.embed_images(batch, [])
    assert (whole @ model.text(captions).T).argmax(1).tolist() == [0, 1, 2, 3]
