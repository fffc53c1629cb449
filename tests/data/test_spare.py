"""Damaged records end the run, or others like them take their place: the same ones on any devices, always."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_stores import damage
from safetensors.torch import save

from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.image import encode_png
from illume_lightning.data.latents import KIND, PlannedLatents, pack
from illume_lightning.data.loader import PlanBatches, PlanLoader, PlannedImages
from illume_lightning.data.packed_batch import ConversationData, PackedConversations
from illume_lightning.data.packing import ConversationSource, PackPlan
from illume_lightning.data.part import Sample
from illume_lightning.data.plan import DatasetSource, Phase, Plan, PlanItem
from illume_lightning.data.prepare_conversations import prepare_conversations
from illume_lightning.data.store import DamagedRecord, ImageStore, Store
from illume_lightning.data.text_tokenizer import TextTokenizer, train_tokenizer
from illume_lightning.data.token_cache import KIND as CODES
from illume_lightning.data.token_cache import TokenCache, pack_codes
from illume_lightning.data.writer import write_stores
from illume_lightning.vocabulary import Vocabulary

BAD = (3, 17)
SEED = 5


@pytest.fixture
def damaged(shapes: Path, tmp_path: Path) -> Path:
    """Two of 48 pictures of two sizes are damaged."""
    folder = Path(shutil.copytree(shapes / "train", tmp_path / "train"))
    damage(folder, *BAD)
    return folder


def plan_of(store: Store, phase: Phase) -> Plan:
    return Plan([phase], [DatasetSource("shapes", store.sizes, store.chunk_ids)], SEED)


def batches(
    folder: Path, phase: Phase, rank: int = 0, world_size: int = 1, is_tolerant: bool = True
) -> list[Any]:
    store = ImageStore(folder)
    plan = plan_of(store, phase)
    reader = PlannedImages([store], SEED, 0.5, is_tolerant)
    steps, micro = range(phase.until_step), range(phase.accumulation(world_size))
    return [reader.read(plan.batch(step, number, rank, world_size)) for step in steps for number in micro]


def by_number(found: list[Any]) -> dict[int, tuple[int, bytes]]:
    """Record and picture of every sample."""
    return {
        int(number): (int(index), image.numpy().tobytes())
        for batch in found
        for number, index, image in zip(batch.sample_number, batch.index, batch.images, strict=True)
    }


@pytest.mark.parametrize("mode", ["fixed", "multi_ratio", "any_resolution"])
def test_others_take_the_place_of_damaged_pictures(mode: Any, damaged: Path, shapes: Path) -> None:
    phase = Phase(12, mode, 64, 8, 8)
    found, sound = batches(damaged, phase), batches(shapes / "train", phase)
    seen = by_number(found)
    sizes = ImageStore(damaged).sizes
    num_replaced = 0
    for number, (index, image) in by_number(sound).items():
        if index not in BAD:
            assert seen[number] == (index, image)
            continue
        num_replaced += 1
        assert seen[number][0] not in BAD
        assert sizes[seen[number][0]].tolist() == sizes[index].tolist()
        assert seen[number][1] != image
    assert num_replaced >= 4
    messages = [line for batch in found for line in batch.damages]
    assert len(messages) == num_replaced
    assert all("record 3 of" in line or "record 17 of" in line for line in messages)
    assert not any(batch.damages for batch in sound)
    # Wherever and however often it is read, the same; and not always the same one.
    assert by_number(batches(damaged, phase)) == seen
    shared = [batches(damaged, Phase(12, mode, 64, 8, 2), rank, 2) for rank in range(2)]
    assert by_number([batch for device in shared for batch in device]) == seen
    assert len({seen[number][0] for number, (index, _) in by_number(sound).items() if index in BAD}) > 2


def test_without_tolerance_the_first_one_is_an_error(damaged: Path) -> None:
    with pytest.raises(DamagedRecord, match=r"record (3|17) of .*chunk-\d+-\d+.bin; copy this file again"):
        batches(damaged, Phase(12, "fixed", 64, 8, 8), is_tolerant=False)


def test_nothing_sound_is_left(damaged: Path) -> None:
    damage(damaged, *(index for index in range(48) if index not in BAD))
    with pytest.raises(DamagedRecord, match=r"record .* is damaged .* no sound record of its size"):
        batches(damaged, Phase(1, "fixed", 64, 8, 8))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_counts_records_and_stops(
    num_workers: int, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = ImageStore(damaged)

    def loader(most: int) -> PlanLoader:
        reader, steps = PlannedImages([store], SEED, is_tolerant=True), Phase(12, "fixed", 64, 8, 8)
        return PlanLoader(
            reader,
            PlanBatches(plan_of(store, steps), 0, 1),
            lambda: 0,
            "",
            max_bad_samples=most,
            num_workers=num_workers,
        )

    assert len(list(loader(2))) == 12  # both come twice, and are counted once
    lines = [
        record.getMessage() for record in caplog.records if "in place of a damaged one" in record.getMessage()
    ]
    assert [line.partition(":")[0][-14:] for line in lines] == ["1 of at most 2", "2 of at most 2"]
    with pytest.raises(
        DamagedRecord, match=r"2 damaged records are more than max_bad_samples=1; the last: record"
    ):
        list(loader(1))


# -- latents --


class LatentsPart:
    """Latents of two sizes."""

    num_items = 12

    def read(self) -> Any:
        for index in range(12):
            height = 16 + 16 * (index % 2)
            latents = torch.full((2, height // 8, 2), float(index))
            data = pack(latents, {"pixel": torch.full((1, 1), index)})
            if index == 4:
                data = save(
                    {"latents": torch.full((2, 2, 2), torch.nan).half(), "pixel": torch.zeros(1, 1).int()}
                )
            if index == 6:
                data = b"no tensors"
            yield Sample(str(index), data, f"{index}", "{}", height, 16)


def test_latents(tmp_path: Path) -> None:
    write_stores(tmp_path / "latents", {"kind": KIND, "tokenizer": "t"}, lambda: [LatentsPart()])
    damage(tmp_path / "latents", 2)
    store = ImageStore(tmp_path / "latents")
    items = [PlanItem(0, index, (16, 16), number) for number, index in enumerate((0, 2, 4, 6, 8))]
    for item, message in zip(
        items[1:4], ("not those that were written", "not finite", "no latents"), strict=True
    ):
        with pytest.raises(DamagedRecord, match=f"record {item.index} of .*{message}"):
            PlannedLatents([store]).read([item])
    batch = PlannedLatents([store], SEED, is_tolerant=True).read(items)
    assert batch.latents.shape == (5, 2, 2, 2) and batch.latents.isfinite().all()
    assert (
        batch.latents[:, 0, 0, 0].tolist() == batch.index.tolist() == [float(text) for text in batch.captions]
    )
    assert len(batch.damages) >= 3 and {0, 8} <= set(batch.index.tolist()) <= {0, 8, 10}
    assert batch.sample_number.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 70_000.0])
def test_latents_that_are_not_finite_are_not_written(bad: float) -> None:
    with pytest.raises(FloatingPointError, match="not finite in fp16"):
        pack(torch.tensor([[[1.0, bad]]]), {})


# -- conversations --


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TextTokenizer]:
    """36 conversations: descriptions, generations and plain text, of several lengths."""
    root = tmp_path_factory.mktemp("talks")
    train_tokenizer(["a cat and a dog"], root / "tokenizer", 270)
    lines = []
    for number in range(36):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 2, 24, 3), np.uint8)
        (root / f"{number}.png").write_bytes(encode_png(pixels))
        words = "word " * (1 + number % 4) + str(number)
        turns = [("<image>?", words), (words, "<image>"), (words, "Yes.")][number % 3]
        turns = [{"from": name, "value": text} for name, text in zip(("human", "gpt"), turns, strict=True)]
        lines.append(json.dumps({"conversations": turns, "image": f"{number}.png" if number % 3 < 2 else []}))
    (root / "a.jsonl").write_text("\n".join(lines))
    prepare_conversations([str(root / "a.jsonl")], root / "store", tokenizer=str(root / "tokenizer"))
    return root / "store", TextTokenizer(str(root / "tokenizer"))


class CodesPart:
    """Codes of the 12 images to generate; one has a code that no codebook has."""

    num_items = 12

    def read(self) -> Any:
        for number in range(12):
            semantic, pixel = np.full(4, 9 if number == 5 else 1), np.full(16, number % 16)
            yield Sample(str(number), pack_codes(semantic, pixel), "", "{}", 64, 64)


def packed(
    folder: Path, tokenizer: TextTokenizer, tokens: Path | None = None, is_tolerant: bool = True
) -> list[Any]:
    store, vocabulary = (
        ConversationStore(folder),
        Vocabulary(tokenizer.vocabulary(8, 16, 16, 16).num_text, 8, 16, 16),
    )
    phase = Phase(9, "fixed", 64, 6, 6)
    source = ConversationSource(
        "talks", store.num_text, store.num_supervised, store.first_image, store.images, store.chunk_ids
    )
    plan = PackPlan([phase], [source], vocabulary, 400, SEED)
    caches = [] if tokens is None else [TokenCache(tokens, store)]
    data = [ConversationData(store, caches)]
    reader = PackedConversations(data, [phase], vocabulary, tokenizer, SEED, is_tolerant=is_tolerant)
    return [reader.read(plan.batch(step, 0, 0, 1)) for step in range(9)]


def test_packed_conversations(talks: tuple[Path, TextTokenizer], tmp_path: Path) -> None:
    folder, tokenizer = talks
    broken = Path(shutil.copytree(folder, tmp_path / "store"))
    bad = (7, 12, 20)  # a generation, a description, a text
    damage(broken, *bad)
    with pytest.raises(DamagedRecord, match=rf"record \d+ of {broken} is damaged"):
        packed(broken, tokenizer, is_tolerant=False)
    sound, found = packed(folder, tokenizer), packed(broken, tokenizer)
    store = ConversationStore(folder)
    num_replaced = 0
    for one, other in zip(sound, found, strict=True):
        assert one.sample_number.tolist() == other.sample_number.tolist()
        assert one.num_supervised == other.num_supervised and other.ids.shape[1] <= one.ids.shape[1]
        assert [image.shape for image in one.images] == [image.shape for image in other.images]
        assert [image.shape for image in one.target_images] == [image.shape for image in other.target_images]
        for index, taken in zip(one.index.tolist(), other.index.tolist(), strict=True):
            assert (index == taken) == (index not in bad)
            if index in bad:
                num_replaced += 1
                assert taken not in bad and taken % 3 == index % 3
                assert 0 <= store.num_text[index] - store.num_text[taken] <= 5
    assert num_replaced == sum(len(batch.damages) for batch in found) >= 3
    for one, other in zip(found, packed(broken, tokenizer), strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.index, other.index)


def test_codes_of_conversations(talks: tuple[Path, TextTokenizer], tmp_path: Path) -> None:
    folder, tokenizer = talks
    identity = {
        "kind": CODES, "source": ConversationStore(folder).manifest.fingerprint, "tokenizer": "t", "mode": "fixed",
        "side": 64, "size_step": 16, "codebooks": {"semantic": 8, "pixel": 16},
    }  # fmt: skip
    write_stores(tmp_path / "codes", identity, lambda: [CodesPart()])
    damage(tmp_path / "codes", 2)
    cache = TokenCache(tmp_path / "codes", ConversationStore(folder))
    with pytest.raises(DamagedRecord, match="record 5 of .*semantic codes are outside 0 to 7"):
        cache.codes(16, 0)
    found = packed(folder, tokenizer, tmp_path / "codes")
    taken = {int(index) for batch in found for index in batch.index}
    assert not taken & {3 * 2 + 1, 3 * 5 + 1}  # the conversations whose codes are damaged
    assert {
        line.partition(" is damaged")[0].partition(" of ")[0] for batch in found for line in batch.damages
    } == {
        "record 2",
        "record 5",
    }
