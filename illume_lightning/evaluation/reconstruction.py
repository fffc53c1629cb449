"""What a tokenizer and a diffusion decoder keep of held-out pictures."""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from illume_lightning.data.worlds.shapes import Scene
from illume_lightning.data.worlds.shapes_checker import read_scene
from illume_lightning.evaluation.pictures import psnr, ssim
from illume_lightning.evaluation.scores import SAMPLES_PER_TASK, Results, Score, Shown, Unit
from illume_lightning.evaluation.statistics import Estimate, mean, share
from illume_lightning.lit.codebook_usage import CodebookUsage
from illume_lightning.lit.datamodule import ImageBatch, ImageDataModule
from illume_lightning.lit.diffusion_decoder import DiffusionDecoderModule, enlarge
from illume_lightning.lit.dualvitok import to_float, to_uint8
from illume_lightning.lit.reconstruction_metrics import tower_distance
from illume_lightning.nn.condition import replace_codes
from illume_lightning.nn.dualvitok import DualCodes, DualViTok
from illume_lightning.nn.token_sampling import drawing_seed

SCENE = "scene"
WRONG_CODES = 0.1
"""Share of the codes of a picture that is replaced, to see what a tokenizer bears."""

ORIGINALS = "originals"
DUALVITOK = "dualvitok"

_UNITS: dict[str, Unit] = {"psnr": "dB", "ssim": "ssim", "tower_distance": "distance"}


@dataclass
class _Collected:
    """Values of each picture by what is measured, of one way to make pictures."""

    values: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    scenes: list[bool] = field(default_factory=list)
    """Whether the checker reads each picture exactly as the world's scene that it shows."""

    def add(self, name: str, values: Sequence[float]) -> None:
        """Values of a batch."""
        self.values[name] += values

    def read(self, pictures: Tensor, scenes: Sequence[Scene | None]) -> None:
        """Let the checker read a batch (B, 3, H, W) in [-1, 1]; those without a known scene are left out."""
        for pixels, scene in zip(_pixels(pictures), scenes, strict=True):
            if scene is not None:
                self.scenes.append(read_scene(pixels).scene == scene)


@torch.no_grad()
def score_tokenizer(model: DualViTok, data: ImageDataModule, seed: int) -> Results:
    """Pictures through codes and back, the same with some codes wrong, and how much of the codebooks is used.

    Args:
        model: on its device.
        data: set up to test.
        seed: of the wrong codes.
    """
    results = Results()
    for task, batches in _loaders(data):
        made, made_of_wrong, originals = _Collected(), _Collected(), _Collected()
        usage = {
            name: CodebookUsage(q.codebook_size).to(_device(model)) for name, q in model.quantizers.items()
        }
        for batch in batches:
            images, scenes = to_float(batch.images.to(_device(model))), _scenes(batch)
            output = model(images)
            pictures = output.reconstruction.float().clamp(-1, 1)
            _measure(made, pictures, images, scenes)
            generator = torch.Generator().manual_seed(drawing_seed(seed, task, int(batch.index[0])))
            wrong = replace_codes(output.encoded.codes, model, WRONG_CODES, generator)
            _measure(made_of_wrong, model.decode_codes(wrong).float().clamp(-1, 1), images, scenes)
            originals.read(images, scenes)
            for name, count in usage.items():
                count.update(getattr(output.encoded.codes, name))
            _show(results, task, batch, pictures, scenes)
        results.scores += _scores(task, made, {}, originals)
        results.scores += _usage_scores(task, usage, len(made.values["psnr"]))
        results.scores += _scores(f"{task}-wrong{100 * WRONG_CODES:.0f}", made_of_wrong, {}, originals)
    return results


@torch.no_grad()
def score_diffusion_decoder(module: DiffusionDecoderModule, data: ImageDataModule, seed: int) -> Results:
    """Pictures through codes of half their size and back; the baseline is DualViTok's own decoder, enlarged.

    Args:
        module: with its tokenizer, on its device.
        data: set up to test.
        seed: of the noise.
    """
    results = Results()
    encoder = module.tokenizer.semantic_encoder

    def measure(
        collected: _Collected, pictures: Tensor, images: Tensor, scenes: Sequence[Scene | None]
    ) -> None:
        _measure(collected, pictures, images, scenes)
        if encoder is not None:
            collected.add("tower_distance", tower_distance(encoder, pictures, images).tolist())

    for task, batches in _loaders(data):
        made, dualvitok, originals = _Collected(), _Collected(), _Collected()
        for batch in batches:
            images, scenes = to_float(batch.images.to(_device(module.tokenizer))), _scenes(batch)
            codes: DualCodes = module.encode(images)
            pictures = module.decode(
                codes, [drawing_seed(seed, task, i) for i in batch.index.tolist()]
            ).float()
            measure(made, pictures, images, scenes)
            measure(dualvitok, enlarge(module.tokenizer.decode_codes(codes).float()), images, scenes)
            originals.read(images, scenes)
            _show(results, task, batch, pictures, scenes)
        results.scores += _scores(task, made, {DUALVITOK: dualvitok}, originals)
    return results


def _loaders(data: ImageDataModule) -> Iterator[tuple[str, Iterable[ImageBatch]]]:
    """Every store at every size: its task, which names the size only where there are several, and batches."""
    loaders = data.test_dataloader()
    has_one_size = len(loaders) == len(data.paths["test"])
    yield from zip(data.paths["test"] if has_one_size else data.val_names, loaders, strict=True)


def _measure(collected: _Collected, pictures: Tensor, images: Tensor, scenes: Sequence[Scene | None]) -> None:
    collected.add("psnr", psnr(pictures, images))
    collected.add("ssim", ssim(pictures, images))
    collected.read(pictures, scenes)


def _scores(task: str, made: _Collected, others: dict[str, _Collected], originals: _Collected) -> list[Score]:
    """Scores of one loader."""
    scores = []
    for name, values in made.values.items():
        baselines = {other: mean(found.values[name]).value for other, found in others.items()}
        scores.append(Score.of(task, name, mean(values), _UNITS[name], baselines))
    if made.scenes:
        read = {other: share(found.scenes).value for other, found in {**others, ORIGINALS: originals}.items()}
        scores.append(Score.of(task, SCENE, share(made.scenes), "share", read))
    return scores


def _usage_scores(task: str, usage: dict[str, CodebookUsage], n: int) -> list[Score]:
    """Codebooks' health. It is of just these pictures, of which fewer would use less: there are no limits."""
    scores = []
    for branch, count in usage.items():
        health = count.compute()
        names: list[tuple[str, Tensor, Unit]] = [
            ("usage", health.usage, "share"),
            ("perplexity", health.perplexity, "perplexity"),
        ]
        for name, value, unit in names:
            exact = Estimate(float(value), float(value), float(value), n)
            scores.append(Score.of(task, f"{branch}_{name}", exact, unit))
    return scores


def _show(
    results: Results, task: str, batch: ImageBatch, pictures: Tensor, scenes: Sequence[Scene | None]
) -> None:
    """Keep a task's first pictures."""
    first = slice(max(0, SAMPLES_PER_TASK - sum(sample.task == task for sample in results.shown)))
    originals = batch.images[first].permute(0, 2, 3, 1).numpy()
    shown = zip(originals, _pixels(pictures[first]), batch.captions[first], scenes[first], strict=True)
    for given, pixels, caption, scene in shown:
        original = Image.fromarray(given)
        right = None if scene is None else read_scene(pixels).scene == scene
        made = (Image.fromarray(pixels),)
        results.shown.append(Shown(task, caption, (original,), made, original, right=right))


def _scenes(batch: ImageBatch) -> list[Scene | None]:
    """The shapes world's scenes that a batch shows; none for pictures that are something else."""
    contents = [json.loads(meta) for meta in batch.metas]
    return [Scene.from_dict(content) if _is_scene(content) else None for content in contents]


def _is_scene(content: object) -> bool:
    return isinstance(content, dict) and {"background", "objects"} <= content.keys()


def _pixels(pictures: Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [-1, 1] -> B of uint8 (H, W, 3)."""
    return list(to_uint8(pictures).permute(0, 2, 3, 1).contiguous().cpu().numpy())


def _device(model: DualViTok) -> torch.device:
    return next(model.parameters()).device
