import subprocess
import sys
import zlib
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from callbacks.resolution_curriculum import ResolutionCurriculum
from illume_lightning.data.loader import TargetSize, deal_batches, decode_stored, evaluation_items
from illume_lightning.data.plan import Phase
from illume_lightning.data.prepare import prepare_images
from illume_lightning.data.store import ImageStore
from illume_lightning.data.transform import decode_at, is_flipped
from illume_lightning.lit.datamodule import ImageBatch, ImageDataModule, Source

PHASES = [
    Phase(4, "fixed", 32, 4, 2),
    Phase(7, "multi_ratio", 48, 4, 4),
    Phase(12, "any_resolution", 64, 6, 2),
]
ONE_PASS = [Phase(p.until_step, p.mode, p.side, p.batch_size, p.batch_size) for p in PHASES]


def write_pictures(folder: Path, sizes: list[tuple[int, int]], seed: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number, (height, width) in enumerate(sizes):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"picture {number} of {seed}")


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> list[str]:
    root = tmp_path_factory.mktemp("stores")
    rng = np.random.default_rng(0)
    for seed, count in ((1, 23), (2, 9)):
        sizes = [tuple(map(int, rng.integers(30, 70, 2))) for _ in range(count)]
        write_pictures(root / f"pictures{seed}", sizes, seed)
        prepare_images([str(root / f"pictures{seed}")], root / f"store{seed}")
    return [str(root / "store1"), str(root / "store2")]


def checksum(images: torch.Tensor) -> int:
    return zlib.crc32(images.contiguous().numpy().tobytes())


class Recorder(L.LightningModule):
    """Learns a bias per channel, and writes down what it was given."""

    def __init__(self, manual: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.bias = torch.nn.Parameter(torch.zeros(3))
        self.seen: list[tuple] = []

    def training_step(self, batch: ImageBatch, batch_idx: int):
        self.seen.append(
            (
                batch_idx,
                self.global_step,
                tuple(batch.images.shape),
                batch.dataset.tolist(),
                batch.index.tolist(),
                batch.sample_number.tolist(),
                checksum(batch.images),
                batch.captions,
            )
        )
        loss = (batch.images.float().mean((0, 2, 3)) / 255 - self.bias).square().sum()
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss / self.accumulation)
        if self.micro_batch == self.accumulation - 1:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return None

    def validation_step(self, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen.append((dataloader_idx, tuple(batch.images.shape), batch.index.tolist()))

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stop(L.Callback):
    """Ends a run as an exception does, in the middle of a training step."""

    def __init__(self, batch_idx: int) -> None:
        self.batch_idx = batch_idx

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx == self.batch_idx:
            raise KeyError("stop")


def datamodule(stores: list[str], **options) -> ImageDataModule:
    train = [Source(stores[0], 2.0), Source(stores[1])]
    return ImageDataModule(train, **({"num_workers": 0, "seed": 5} | options))


def trainer(phases: list[Phase], *callbacks: L.Callback, **options) -> L.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": phases[-1].until_step,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(callbacks=[ResolutionCurriculum(phases), *callbacks], **(defaults | options))


def fit(stores, phases=PHASES, *callbacks, manual=True, ckpt_path=None, data=None, **options) -> Recorder:
    module = Recorder(manual)
    trainer(phases, *callbacks, **options).fit(
        module, datamodule(stores, **(data or {})), ckpt_path=ckpt_path, weights_only=True
    )
    return module


@pytest.fixture(scope="module")
def uninterrupted(stores) -> Recorder:
    return fit(stores)


# -- training --


def test_phases_switch_at_the_exact_step(uninterrupted):
    by_step = {}
    for batch_idx, step, shape, *_ in uninterrupted.seen:
        by_step.setdefault(step, []).append((batch_idx, shape))
    assert list(by_step) == list(range(12))
    for step, batches in by_step.items():
        if step < 4:
            assert [shape for _, shape in batches] == [(2, 3, 32, 32)] * 2
        elif step < 7:
            assert [shape[0] for _, shape in batches] == [4]
        else:
            assert [shape[0] for _, shape in batches] == [2] * 3
            assert len({shape for _, shape in batches}) == 1, "one size in a training step"
    assert [batch_idx for batch_idx, *_ in uninterrupted.seen] == list(range(4 * 2 + 3 + 5 * 3))
    assert [number for *_, numbers, _, _ in uninterrupted.seen for number in numbers] == list(range(58))


def test_batches_hold_what_the_plan_names(stores, uninterrupted):
    data = datamodule(stores)
    data.set_curriculum(PHASES)
    for batch_idx, step, shape, datasets, indices, numbers, pixels, captions in uninterrupted.seen:
        place = data.plan.schedule.locate(batch_idx, 1)
        items = data.plan.batch(place.step, place.number, 0, 1)
        assert step == place.step
        assert [tuple(item[:2]) for item in items] == list(zip(datasets, indices, strict=True))
        assert [item.sample_number for item in items] == numbers
        assert all(item.size == shape[2:] for item in items)
        assert captions == [f"picture {item.index} of {item.dataset + 1}" for item in items]
        images = [
            decode_at(
                data._train_stores()[item.dataset].read(item.index).image,
                item.size,
                stretch=item.stretch,
                flip=is_flipped(5, item.sample_number, 0.5),
            )
            for item in items
        ]
        assert pixels == checksum(torch.from_numpy(np.stack(images)))


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_change_nothing(stores, uninterrupted, num_workers):
    module = fit(stores, data={"num_workers": num_workers, "prefetch": 3})
    assert module.seen == uninterrupted.seen
    assert torch.equal(module.bias, uninterrupted.bias)


def test_automatic_optimization_reads_the_same_samples(stores, uninterrupted):
    module = fit(stores, ONE_PASS, manual=False)
    assert len(module.seen) == 12
    samples = [(s, n) for _, s, _, _, _, numbers, _, _ in module.seen for n in numbers]
    assert samples == [(s, n) for _, s, _, _, _, numbers, _, _ in uninterrupted.seen for n in numbers]
    assert torch.allclose(module.bias, uninterrupted.bias, atol=1e-6)


@pytest.mark.parametrize("manual", [True, False])
def test_resume_at_every_step_equals_the_uninterrupted_run(stores, tmp_path, manual):
    phases = PHASES if manual else ONE_PASS
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    whole = fit(stores, phases, save, manual=manual)
    for step in range(1, 13):
        module = fit(stores, phases, manual=manual, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert module.seen == [seen for seen in whole.seen if seen[1] >= step], step
        assert torch.equal(module.bias, whole.bias), step


def test_a_chain_of_crashes_loses_and_repeats_nothing(stores, tmp_path, uninterrupted):
    """Stopped within training steps, saved on the exception, resumed with other workers."""
    seen, path = [], None
    for number, batch_idx in enumerate((3, 9, 17, 22)):
        module = Recorder()
        save = ModelCheckpoint(tmp_path / str(number), "{step}", save_on_exception=True)
        with pytest.raises(KeyError, match="stop"):
            trainer(PHASES, Stop(batch_idx), save).fit(
                module, datamodule(stores, num_workers=number % 2), ckpt_path=path, weights_only=True
            )
        path = str(next((tmp_path / str(number)).iterdir()))
        step = torch.load(path, weights_only=True)["global_step"]
        seen += [batch for batch in module.seen if batch[1] < step]
    seen += fit(stores, ckpt_path=path).seen
    assert seen == uninterrupted.seen


def test_resume_with_another_micro_batch_size(stores, tmp_path, uninterrupted):
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    fit(stores, PHASES, save)
    phases = [Phase(p.until_step, p.mode, p.side, p.batch_size, 1) for p in PHASES]
    for step in (3, 4, 9):
        module = fit(stores, phases, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        samples = [(s, n) for _, s, _, _, _, numbers, _, _ in module.seen for n in numbers]
        expected = [
            (s, n) for _, s, _, _, _, numbers, _, _ in uninterrupted.seen for n in numbers if s >= step
        ]
        assert samples == expected
        assert torch.allclose(module.bias, uninterrupted.bias, atol=1e-6)
        counts = [4 * 4, 4 * 4 + 3 * 4, 4 * 4 + 3 * 4 + 5 * 6]
        assert module.seen[-1][0] == counts[-1] - 1, "Lightning counts the plan's micro-batches"


def test_resume_warns_of_other_data(stores, tmp_path, caplog):
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=5)
    fit(stores, PHASES, save)
    path = str(tmp_path / "step=5.ckpt")
    fit(stores, ckpt_path=path, data={"horizontal_flip": 0.0})
    assert "differ from the checkpoint's" not in caplog.text
    fit(stores, ckpt_path=path, data={"seed": 6})
    assert "from step 5 on the run reads the new order" in caplog.text


def test_sample_images_are_those_training_sees_next(stores, uninterrupted):
    data = datamodule(stores)
    data.set_curriculum(PHASES)
    sampled = [checksum(images) for images in data.sample_images(6)]
    first_of_step = {step: pixels for _, step, *_, pixels, _ in reversed(uninterrupted.seen)}
    assert sampled == [first_of_step[step] for step in range(6)]
    assert len(list(data.sample_images(100))) == 12


def test_data_draw_no_random_numbers_of_the_run(stores):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    data = datamodule(stores, val={"b": stores[1]}, val_sizes=[32])
    trainer(PHASES).fit(Recorder(), data)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


TWO_DEVICES = """
import sys
sys.path[:0] = {paths!r}
from test_datamodule import *

phases = [Phase(p.until_step, p.mode, p.side, p.batch_size, 1) for p in PHASES]
evaluation = dict(val=dict(a={stores!r}[0]), val_sizes=[32], val_any_resolution=64, val_batch_size=4)
results = []
for path in (None, {checkpoint!r}):
    save = ModelCheckpoint({folder!r}, "{{step}}", save_top_k=-1, every_n_train_steps=5)
    run = trainer(phases, save, devices=2, strategy="ddp")
    module = Recorder()
    run.fit(module, datamodule({stores!r}, **evaluation), ckpt_path=path, weights_only=True)
    results.append((module.seen, module.bias.detach()))
torch.save(results, {folder!r} + f"/rank{{run.global_rank}}.pt")
"""


def run_on_two_devices(stores: list[str], folder: Path, checkpoint: Path) -> list[list[tuple]]:
    """Train from the beginning, then from a checkpoint; what both ranks saw, and their parameters."""
    folder.mkdir()
    here = Path(__file__).parent
    script = folder / "run.py"
    paths = [str(here), str(here.parents[1])]
    script.write_text(
        TWO_DEVICES.format(paths=paths, folder=str(folder), stores=stores, checkpoint=str(checkpoint))
    )
    done = subprocess.run([sys.executable, str(script)], timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_devices_share_the_run_and_hand_it_over(stores, tmp_path, uninterrupted):
    save = ModelCheckpoint(tmp_path / "one", "{step}", save_top_k=-1, every_n_train_steps=5)
    fit(stores, PHASES, save)
    ranks = run_on_two_devices(stores, tmp_path / "two", tmp_path / "one" / "step=5.ckpt")
    alone = {(step, number) for _, step, *_, numbers, _, _ in uninterrupted.seen for number in numbers}
    for part, first_step in ((0, 0), (1, 5)):
        seen = [rank[part][0] for rank in ranks]
        training = [[batch for batch in batches if len(batch) == 8] for batches in seen]
        assert [b[:3] for b in training[0]] == [b[:3] for b in training[1]], "one size at every step"
        together = [(batch[1], number) for batches in training for batch in batches for number in batch[5]]
        assert sorted(together) == sorted(pair for pair in alone if pair[0] >= first_step)
        for rank in ranks:
            assert torch.allclose(rank[part][1], uninterrupted.bias, atol=1e-6)
        for loader in (0, 1):
            evaluated = [[b for b in batches if len(b) == 3 and b[0] == loader] for batches in seen]
            assert len(evaluated[0]) == len(evaluated[1]) > 0, "models wait for each other in every batch"
    module = fit(stores, ckpt_path=str(tmp_path / "two" / "step=10.ckpt"))
    assert module.seen == [batch for batch in uninterrupted.seen if batch[1] >= 10]


# -- evaluation --


def test_evaluation_loaders(stores):
    data = datamodule(
        stores,
        val={"a": stores[0], "b": stores[1]},
        test={"a": stores[0]},
        predict={"b": stores[1]},
        val_sizes=[32, 48],
        val_any_resolution=64,
        val_batch_size=5,
    )
    module = Recorder()
    run = trainer(PHASES)
    run.validate(module, data, verbose=False)
    assert data.val_names == ["a-32", "a-48", "a-any64", "b-32", "b-48", "b-any64"]
    for loader, side, counts in ((0, 32, [5, 5, 5, 5, 3]), (4, 48, [5, 4])):
        batches = [seen for seen in module.seen if seen[0] == loader]
        assert [shape for _, shape, _ in batches] == [(count, 3, side, side) for count in counts]
    assert sum(len(indices) for loader, _, indices in module.seen if loader in (2, 5)) == 32
    for name, count in (("test", 23), ("predict", 9)):
        module.seen.clear()
        getattr(run, name)(module, data)
        assert [sum(len(i) for k, _, i in module.seen if k == loader) for loader in range(3)] == [count] * 3
        assert len(data.val_names) == 3


def test_any_resolution_evaluation_keeps_the_whole_picture(stores):
    data = datamodule(stores, val={"a": stores[0]}, val_sizes=[], val_any_resolution=64, val_batch_size=4)
    data.setup("validate")
    (loader,) = data.val_dataloader()
    store = data._store(stores[0])
    assert len(loader) == len(list(loader))
    indices = []
    for batch in loader:
        for image, index in zip(batch.images, batch.index.tolist(), strict=True):
            size = (image.shape[1], image.shape[2])
            assert np.array_equal(image.numpy(), decode_at(store.read(index).image, size, stretch=True))
            indices.append(index)
    assert sorted(indices) == list(range(23))


def test_val_limit_spreads_over_the_store():
    items = evaluation_items(np.full((80, 2), 64), TargetSize("fixed", 32), limit=10)
    assert [item.index for item in items] == list(range(0, 80, 8))
    assert [item.sample_number for item in items] == list(range(10))
    assert len(evaluation_items(np.full((80, 2), 64), TargetSize("fixed", 32), limit=1000)) == 80


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_evaluation_image_goes_to_one_device(world_size):
    rng = np.random.default_rng(0)
    items = evaluation_items(rng.integers(20, 90, (50, 2)), TargetSize("any_resolution", 64))
    dealt = [deal_batches(items, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in dealt}) == 1
    flat = [item for batches in dealt for batch in batches for item in batch]
    assert sorted(flat) == sorted(items)
    assert all(len({item.size for item in batch}) == 1 for batches in dealt for batch in batches)
    assert max(len(batch) for batches in dealt for batch in batches) <= 4


def test_too_few_evaluation_images_for_the_devices():
    items = evaluation_items(np.full((5, 2), 64), TargetSize("fixed", 32))
    assert [len(batches) for batches in (deal_batches(items, 4, rank, 5) for rank in range(5))] == [1] * 5
    with pytest.raises(ValueError, match="5 evaluation images cannot be dealt evenly to 8 devices"):
        deal_batches(items, 4, 0, 8)


# -- batches --


def test_evaluation_at_ratios(stores):
    sizes = np.array([[100, 100], [60, 130], [130, 60], [40, 400]])
    items = evaluation_items(sizes, TargetSize("multi_ratio", 96, 32))
    of_record = {item.index: item.size for item in items}
    assert of_record == {0: (96, 96), 1: (64, 128), 2: (128, 64), 3: (64, 192)}
    assert not any(item.stretch for item in items)
    data = datamodule(stores, val={"mine": str(stores[0])}, val_sizes=[64], val_ratios=96, val_size_step=32)
    data.val_dataloader()
    assert data.val_names == ["mine-64", "mine-ratio96"]


def test_lightning_and_pinning_keep_the_batch_type(stores, monkeypatch):
    data = datamodule(stores)
    data.set_curriculum(PHASES)
    items = data.plan.batch(0, 0, 0, 1)
    batch = data._training_reader().read(items)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert type(moved) is ImageBatch
    assert moved.captions == batch.captions
    assert {getattr(moved, f).device.type for f in ("images", "dataset", "index", "sample_number")} == {
        "meta"
    }
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)  # there may be no accelerator
    pinned = pin_memory(batch)
    assert type(pinned) is ImageBatch
    assert pinned.captions == batch.captions
    assert torch.equal(pinned.index, batch.index + 1)


# -- refusals --


def test_missing_and_empty_stores(stores, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*illume prepare"):
        fit([str(tmp_path / "nowhere"), stores[1]])
    data = datamodule(stores, val={"gone": str(tmp_path / "gone")})
    with pytest.raises(FileNotFoundError, match=r"gone.*illume prepare"):
        trainer(PHASES).fit(Recorder(), data)


def test_a_damaged_image_is_named(stores):
    store = ImageStore(stores[0])
    with pytest.raises(
        ValueError, match=r"record 3 of .*store1 is damaged \(an image cannot be .*copy this file"
    ):
        decode_stored(store.read(3).image[:60], (32, 32), store, 3)


def test_missing_curriculum(stores):
    run = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="add the ResolutionCurriculum callback"):
        run.fit(Recorder(), datamodule(stores))


def test_missing_training_data():
    with pytest.raises(ValueError, match="no training data; list stores under `train`"):
        trainer(PHASES).fit(Recorder(), ImageDataModule())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizontal_flip": 1.5}, "horizontal_flip 1.5 is no probability"),
        ({"val_sizes": [100]}, "100 x 100.*nearest such size is 96 x 96"),
        ({"val_batch_size": 0}, "val_batch_size 0 is not positive"),
        ({"val_limit": 0}, "val_limit 0 is not positive"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**options)


def test_nothing_is_saved_as_hyperparameters(stores):
    assert not datamodule(stores).hparams
