"""The small vision encoder's words, regions and loss."""

import math

import pytest
import torch

from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.nn.text_alignment import Region, TextAlignment


@pytest.fixture
def model() -> TextAlignment:
    torch.manual_seed(0)
    return TextAlignment(QwenVisionTower(1, 32, 2, 48), embed_dim=24).eval()


def vectors(model: TextAlignment, *words: str) -> torch.Tensor:
    """Sums of the words' vectors, which name them and no others as far as there is room."""
    scores = torch.eye(24)[:0]
    for text in words:
        logits, has = model._scores(torch.eye(24), [text] * 24)
        assert has.all()
        scores = torch.cat([scores, logits.sum(1)[None]])
    return torch.nn.functional.normalize(scores.detach(), dim=-1)


def test_a_region_is_the_mean_of_its_cells(model: TextAlignment) -> None:
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    features = model.tower.features(images)
    assert features.shape == (2, 48, 4, 4)
    _, parts = model.embed_images(images, [Region(1, "", 0.0, 0.5, 0.5, 1.0)])
    expected = model.project(features[1, :, :2, 2:].mean((1, 2)))
    torch.testing.assert_close(parts[0], torch.nn.functional.normalize(expected, dim=-1))


def test_what_is_said_counts_and_not_how_often_or_in_which_case(model: TextAlignment) -> None:
    images = torch.nn.functional.normalize(torch.randn(2, 24), dim=-1)
    loss = model.loss(images, ["a red star", "a blue circle"])
    assert loss == model.loss(images, ["A star, a RED star!", "circle: a blue one"[:14] + " a"])
    assert loss != model.loss(images, ["a blue circle", "a red star"])


def test_words_of_other_texts_are_negatives(model: TextAlignment) -> None:
    named = vectors(model, "red star", "blue circle")
    assert model.loss(named, ["red star", "blue circle"]) < model.loss(named, ["blue circle", "red star"])
    assert model.recall(named, ["red star", "blue circle"]).tolist() == [1.0, 1.0]
    assert model.recall(named, ["blue circle", "red star"]).tolist() == [0.0, 0.0]


def test_without_words_there_is_nothing_to_lose(model: TextAlignment) -> None:
    images = torch.nn.functional.normalize(torch.randn(2, 24), dim=-1).requires_grad_()
    loss = model.loss(images, ["", " ... "])
    loss.backward()
    assert loss.item() == 0
    assert model.recall(images, ["", "x"]).tolist() == [1.0, 1.0]
    chance = model.loss(torch.zeros(1, 24), ["one two three"]).item()
    assert chance == pytest.approx(3 * math.log(2))


def test_it_learns_a_tiny_problem(model: TextAlignment) -> None:
    """Two colours in two halves: after some steps pictures and regions name theirs."""
    images, captions, regions = [], [], []
    for left, right in (("red", "blue"), ("blue", "red"), ("red", "red"), ("blue", "blue")):
        image = torch.full((3, 56, 56), -0.5)
        for colour, start in ((left, 0), (right, 28)):
            image[0 if colour == "red" else 2, :, start : start + 28] = 1.0
            regions.append(Region(len(images), colour, 0.0, start / 56, 1.0, (start + 28) / 56))
        images.append(image)
        captions.append(f"{left} {right}")
    batch, phrases = torch.stack(images), [region.phrase for region in regions]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(200):
        whole, parts = model.embed_images(batch, regions)
        loss = model.loss(whole, captions) + model.loss(parts, phrases)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole, parts = model.embed_images(batch, regions)
    assert model.recall(parts, phrases).tolist() == [1.0] * 8
    assert model.recall(whole, captions).tolist() == [1.0] * 4
