"""Training the diffusion decoder: its tokenizer, caches, resume, evaluation, prediction."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image
from tiny import build_tiny
from tiny_trainer import trainer_for

from callbacks import PredictionPictures, ReconstructionGrid
from illume_lightning.data.latents import LatentBatch
from illume_lightning.data.plan import Phase
from illume_lightning.data.store import ImageStore
from illume_lightning.data.worlds.prepare_shapes import prepare_shapes
from illume_lightning.lit.datamodule import ImageDataModule, Source
from illume_lightning.lit.diffusion_decoder import DiffusionDecoderModule, Sampling, encode_at_half_size
from illume_lightning.lit.dualvitok import to_float
from illume_lightning.lit.prepare_latents import prepare_latents
from illume_lightning.lit.tokenizer import fingerprint, load_tokenizer
from illume_lightning.nn.checkpoints import save_dualvitok
from illume_lightning.nn.condition import ConditionNoise
from illume_lightning.nn.diffusion_decoder import DiffusionDecoder, build_unet
from illume_lightning.nn.latents import SpaceToDepth
from illume_lightning.resolution import ratio_sizes

NO_NOISE = ConditionNoise(0, 0, 0, 0)
SIZES = sorted({*ratio_sizes(64, 32), (64, 128)})


def write_tokenizer(folder: Path, seed: int = 0) -> Path:
    """A run's folder, as `illume fit` leaves it."""
    torch.manual_seed(seed)
    state = {f"model.{key}": value for key, value in build_tiny().state_dict().items()}
    (folder / "checkpoints").mkdir(parents=True)
    torch.save({"pytorch-lightning_version": "2", "state_dict": state}, folder / "checkpoints" / "last.ckpt")
    section = {"class_path": "tiny.build_tiny", "init_args": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"model": section}}}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "run")


def build(tokenizer: Path, lr: float = 2e-3, **options: Any) -> DiffusionDecoderModule:
    torch.manual_seed(0)
    unet = build_unet(48, 16, [16, 32], [0, 1], 16, 8, 4, 4, 4)
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    return DiffusionDecoderModule(
        DiffusionDecoder(unet, SpaceToDepth(4), scheduler, sizes=SIZES),
        str(tokenizer),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        sampling=Sampling(2, 1.0),
        **options,
    )


def phases(steps: int, mode: str = "multi_ratio", batch: int = 4, micro: int = 2) -> list[Phase]:
    return [Phase(steps, mode, 64, batch, micro, size_step=32)]


def datamodule(train: Path, **options: Any) -> ImageDataModule:
    options = {"val_sizes": [], "num_workers": 0, "horizontal_flip": 0.0} | options
    return ImageDataModule(train=[Source(str(train))], **options)


def weights(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


# -- tokenizer --


def test_a_tokenizer_loads_from_run_checkpoint_and_published_file(tokenizer, tmp_path, monkeypatch):
    from_run = load_tokenizer(tokenizer)
    assert not from_run.training
    assert not any(parameter.requires_grad for parameter in from_run.parameters())
    assert fingerprint(load_tokenizer(tokenizer / "checkpoints" / "last.ckpt")) == fingerprint(from_run)
    save_dualvitok(from_run, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr("illume_lightning.lit.tokenizer.build_official", build_tiny)
    assert fingerprint(load_tokenizer(tmp_path / "pytorch_model.bin")) == fingerprint(from_run)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_fingerprint_sees_one_bit(tokenizer):
    model = load_tokenizer(tokenizer)
    before = fingerprint(model)
    with torch.no_grad():
        model.pixel_decoder.conv_out.bias[0] += 1e-7
    assert fingerprint(model) != before


# -- training --


def test_only_the_unet_learns_and_the_tokenizer_is_not_saved(shapes, tokenizer, tmp_path):
    module = build(tokenizer)
    before = weights(module)
    trainer_for(tmp_path, phases(2)).fit(module, datamodule(shapes / "train"))
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(key.startswith("model.unet.") for key in after)
    assert not torch.equal(after["model.unet.conv_in.weight"], before["model.unet.conv_in.weight"])
    assert fingerprint(module.tokenizer) == fingerprint(load_tokenizer(tokenizer))
    assert all(parameter.grad is None for parameter in module.tokenizer.parameters())


def test_noise_is_off_in_evaluation_and_the_tokenizer_sees_half(shapes, tokenizer, monkeypatch):
    module = build(tokenizer)
    module.setup("fit")
    sizes = []
    encode = module.tokenizer.encode
    monkeypatch.setattr(
        module.tokenizer, "encode", lambda x: (sizes.append(tuple(x.shape[-2:])), encode(x))[1]
    )
    monkeypatch.setattr(ConditionNoise, "replace", lambda *_: pytest.fail("perturbed in evaluation"))
    monkeypatch.setattr(ConditionNoise, "drop", lambda *_: pytest.fail("dropped in evaluation"))
    images = torch.rand(2, 3, 64, 128) * 2 - 1
    codes = module.encode(images)
    assert sizes == [(32, 64)]
    assert codes.pixel.shape == (2, 2, 4)
    assert module.decode(codes).shape == (2, 3, 64, 128)
    with pytest.raises(ValueError, match=r"48 x 64.*multiples of 32"):
        module.encode(torch.zeros(1, 3, 48, 64))


def test_it_learns_to_denoise(shapes, tokenizer, tmp_path):
    module = build(tokenizer, noise=NO_NOISE)
    losses = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["train/loss"].item())

    trainer_for(tmp_path, phases(40, "fixed", 8, 8), Watch()).fit(module, datamodule(shapes / "train"))
    assert np.mean(losses[-8:]) < 0.7 * np.mean(losses[:4])


def test_resume_equals_the_uninterrupted_run_with_ema_and_accumulation(shapes, tokenizer, tmp_path):
    stages = [Phase(3, "fixed", 64, 4, 2, size_step=32), Phase(6, "multi_ratio", 64, 4, 4, size_step=32)]

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2 and not (tmp_path / "last.ckpt").exists():
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise KeyboardInterrupt

    def run(ckpt_path=None, *extra):
        module = build(tokenizer)
        trainer = trainer_for(tmp_path, stages, EMAWeightAveraging(decay=0.9), *extra)
        torch.manual_seed(3)
        data = datamodule(shapes / "train", horizontal_flip=0.5)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return weights(module)

    whole = run()
    with pytest.raises(SystemExit):
        run(None, Stop())
    resumed = run(str(tmp_path / "last.ckpt"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_another_tokenizer_is_refused(shapes, tokenizer, tmp_path):
    trainer = trainer_for(tmp_path, phases(1))
    trainer.fit(build(tokenizer), datamodule(shapes / "train"))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    other = write_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"a\.ckpt was trained with another tokenizer .*model\.tokenizer"):
        trainer_for(tmp_path, phases(2)).fit(
            build(other), datamodule(shapes / "train"), ckpt_path=str(tmp_path / "a.ckpt")
        )


def test_a_nan_in_the_latents_names_the_batch(shapes, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        SpaceToDepth, "encode", lambda self, x: torch.full((len(x), 48, 16, 16), float("nan"))
    )
    with pytest.raises(FloatingPointError, match=r"latents is not finite at training step 0 .*samples"):
        trainer_for(tmp_path, phases(1, "fixed")).fit(build(tokenizer), datamodule(shapes / "train"))


def test_a_tokenizer_of_other_width_is_refused(shapes, tokenizer, tmp_path):
    unet = build_unet(48, 24, [16], [1], 16, 8, 4, 4, 4)
    module = DiffusionDecoderModule(
        DiffusionDecoder(unet, SpaceToDepth(4), DDPMScheduler(), sizes=SIZES), str(tokenizer)
    )
    with pytest.raises(ValueError, match=r"16 channels of codes, the UNet takes 24"):
        trainer_for(tmp_path, phases(1)).fit(module, datamodule(shapes / "train"))


# -- evaluation and prediction --


def test_validation_compares_both_decoders_and_writes_pictures(shapes, tokenizer, tmp_path):
    module = build(tokenizer)
    data = datamodule(
        shapes / "train", val={"shapes": str(shapes / "val")}, val_sizes=[64], val_limit=4, val_batch_size=4
    )
    trainer = trainer_for(tmp_path, phases(1), ReconstructionGrid(2))
    (first,) = [trainer.validate(module, data, verbose=False)[0]]
    rows = {name.split("/")[1] for name in first}
    assert rows == {
        "shapes-64-diffusion", "shapes-64-dualvitok", "shapes-64-diffusion-wrong10", "shapes-64-dualvitok-wrong10",
    }  # fmt: skip
    assert {name.split("/")[2] for name in first} == {"psnr", "ssim", "tower_distance"}
    assert first["val/shapes-64-dualvitok/psnr"] != first["val/shapes-64-dualvitok-wrong10/psnr"]
    again = trainer.validate(module, data, verbose=False)[0]
    assert first == again
    with Image.open(tmp_path / "pictures" / "validate" / "shapes-64.png") as picture:
        assert picture.size == (2 * 64 + 3 * 4, 5 * 64 + 6 * 4)  # input and four decodings below it


def test_predict_writes_both_sizes_and_a_row(shapes, tokenizer, tmp_path):
    data = datamodule(shapes / "train", predict={"mine": str(shapes / "val")}, val_sizes=[64], val_limit=2)
    trainer = trainer_for(tmp_path, phases(1), PredictionPictures())
    trainer.predict(build(tokenizer), data, return_predictions=False)
    folder = tmp_path / "predictions" / "mine-64"
    assert len(list(folder.iterdir())) == 6
    sizes = {path.name.split("-")[1]: Image.open(path).size for path in sorted(folder.glob("*.png"))}
    assert sizes == {"diffusion.png": (64, 64), "dualvitok.png": (32, 32), "row.png": (64 + 32 + 64 + 16, 72)}


# -- cached latents --


@pytest.fixture(scope="module")
def latents(shapes, tokenizer, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("latents") / "train"
    prepare_latents(str(shapes / "train"), output, str(tokenizer), space_to_depth=4, side=64, part_items=20)
    return output


def test_cached_batches_equal_online_ones(shapes, tokenizer, latents, tmp_path):
    module = build(tokenizer)
    module.setup("fit")
    data = datamodule(latents)
    data.set_curriculum(phases(6))
    items = data.plan.batch(2, 0, 0, 1)
    cached = data._training_reader().read(items)
    assert isinstance(cached, LatentBatch)
    pictures = datamodule(shapes / "train")
    pictures.set_curriculum(phases(6))
    store = ImageStore(latents)
    # Parts hold their records sorted by size; captions tell which is which.
    originals = {ImageStore(shapes / "train").read(i).meta: i for i in range(48)}
    online = pictures._training_reader().read(
        [i._replace(index=originals[store.read(i.index).meta]) for i in items]
    )
    codes, made = module._codes_and_latents(online)
    assert torch.equal(cached.semantic, codes.semantic)
    assert torch.equal(cached.pixel, codes.pixel)
    assert torch.allclose(cached.latents.float(), made, atol=1e-3)
    assert cached.captions == online.captions


def test_a_cache_trains_with_workers_and_says_what_it_is(latents, tokenizer, tmp_path):
    data = datamodule(latents, num_workers=2)
    assert data.tokenizer_fingerprint == fingerprint(load_tokenizer(tokenizer))
    trainer = trainer_for(tmp_path, phases(3))
    trainer.fit(build(tokenizer), data)
    assert trainer.global_step == 3


def test_what_a_cache_refuses(shapes, latents, tokenizer, tmp_path):
    other = write_tokenizer(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"made by another tokenizer .*illume prepare latents"):
        trainer_for(tmp_path, phases(1)).fit(build(other), datamodule(latents))
    with pytest.raises(ValueError, match=r"can't be mirrored; set it to 0"):
        trainer_for(tmp_path, phases(1)).fit(build(tokenizer), datamodule(latents, horizontal_flip=0.5))
    mixed = ImageDataModule(train=[Source(str(latents)), Source(str(shapes / "train"))], horizontal_flip=0.0)
    with pytest.raises(ValueError, match=r"mix latents by .* pictures"):
        mixed.setup("fit")
    with pytest.raises(ValueError, match=r"latents of .* where the phase asks for"):
        trainer_for(tmp_path, [Phase(1, "multi_ratio", 96, 4, 4, size_step=32)]).fit(
            build(tokenizer), datamodule(latents)
        )


def test_preparing_latents_counts_crops_and_does_nothing_twice(tokenizer, tmp_path, capsys):
    prepare_shapes(tmp_path / "train", count=8, sizes=((112, 112), (64, 448)))
    arguments = (str(tmp_path / "train"), tmp_path / "out", str(tokenizer))
    (manifest,) = prepare_latents(*arguments, space_to_depth=4, side=64).values()
    # 64 x 448 is 1:7, and 1:4 the longest ratio there is.
    too_long = int((ImageStore(tmp_path / "train").sizes[:, 1] == 448).sum())
    assert 0 < too_long < 8
    assert {k: loss.count for k, loss in manifest.dropped.items()} == {"cropped by more than 20 %": too_long}
    assert manifest.written == 8 - too_long
    assert prepare_latents(*arguments, space_to_depth=4, side=64)[""] == manifest
    with pytest.raises(ValueError, match=r"either --vae .* or --space_to_depth"):
        prepare_latents(*arguments)
    with pytest.raises(ValueError, match=r"prepared from other inputs or with other options"):
        prepare_latents(*arguments, space_to_depth=4, side=96)


def test_half_size_encoding_matches_a_picture_prepared_at_half(tokenizer):
    """Antialiased bicubic, as the tokenizer's own training pictures are scaled."""
    model = load_tokenizer(tokenizer)
    smooth = np.asarray(Image.linear_gradient("L").resize((64, 64)).convert("RGB"))
    half = np.asarray(Image.fromarray(smooth).resize((32, 32), Image.Resampling.BICUBIC))
    big, small = (to_float(torch.from_numpy(a.copy()).permute(2, 0, 1)[None]) for a in (smooth, half))
    assert torch.equal(encode_at_half_size(big, model).pixel, model.encode(small).codes.pixel)
