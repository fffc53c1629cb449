"""Compare this implementation with recorded tensors of the official model, fixture by fixture.

A fixture folder holds, for any name NAME, size and seed: ``NAME_weights.safetensors``, ``NAME_config.json``,
``NAME_{H}x{W}[...].safetensors`` (one forward pass each), ``NAME_intermediates_{H}x{W}.safetensors``,
``NAME_grads_{H}x{W}.safetensors``, files of single parts (quantiser, noise, discriminator), and those of an MLLM
(``mllm_parity``, ``generation_parity``). Users check a new device or library version with
``illume parity DIR --device ...``.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from illume_lightning.nn.checkpoints import build_official
from illume_lightning.nn.discriminator import PatchDiscriminator
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.generation_parity import compared_generations
from illume_lightning.nn.mllm_parity import compared_batches, recorded_mllms
from illume_lightning.nn.noise import NoiseKind, TokenNoise
from illume_lightning.nn.semantic import patchify
from illume_lightning.nn.simvq import SimVQ

TOLERANCE = 1e-4
MARGIN = 1e-5
"""Code indices may differ where the best two codes are closer than this (squared distance)."""


@dataclass(frozen=True)
class Check:
    """One compared quantity.

    Attributes:
        fixture: file that holds the recorded tensor.
        quantity: its name there.
        error: largest absolute difference over the largest absolute recorded value; for indices the share
            of positions that differ, near-ties of codes apart.
        is_index: whether the quantity is ids, or which of them may come.
    """

    fixture: str
    quantity: str
    error: float
    is_index: bool = False

    @property
    def passed(self) -> bool:
        """Indices agree everywhere; anything else to a relative 1e-4."""
        return self.error == 0 if self.is_index else self.error <= TOLERANCE


def run(directory: str | Path, device: str = "cpu") -> list[Check]:
    """Run every fixture found in a folder, in fp32.

    Args:
        directory: folder laid out as in this module's docstring.
        device: torch device, as ``cpu``, ``cuda:0`` or ``npu:0``.

    Raises:
        FileNotFoundError: the folder is missing or holds no fixture.
        ValueError: the device is unknown or not there.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no folder {directory}: give the folder that holds the parity fixtures.")
    target = _device(device)
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        checks = list(_checks(directory, target))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    if not checks:
        raise FileNotFoundError(
            f"no parity fixture in {directory}: expected files like NAME_weights.safetensors."
        )
    return checks


def table(checks: list[Check]) -> str:
    """A text table of the checks, worst first within each fixture, and a closing line."""
    width = max(len(check.fixture) for check in checks)
    lines = []
    for check in sorted(checks, key=lambda check: (check.fixture, -check.error)):
        kind = "indices differ" if check.is_index else "relative error"
        mark = "ok" if check.passed else "MISS"
        lines.append(f"{check.fixture:{width}}  {check.quantity:42}  {kind} {check.error:9.2e}  {mark}")
    missed = sum(not check.passed for check in checks)
    lines.append(f"{len(checks)} quantities compared, {missed} missed (tolerance {TOLERANCE:g}).")
    return "\n".join(lines)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used here: {str(error).splitlines()[0]}") from error
    return device


def _checks(directory: Path, device: torch.device) -> Iterator[Check]:
    for weights in sorted(directory.glob("*_weights.safetensors")):
        name = weights.name.removesuffix("_weights.safetensors")
        config = json.loads((directory / f"{name}_config.json").read_text())
        if "vq_model" not in config:
            continue
        model = build_official(config["vq_model"]["config"], config["qwen2vit_config"])
        model.load_state_dict({key: value.float() for key, value in load_file(weights).items()})
        model = model.eval().to(device)
        for path in sorted(directory.glob(f"{name}_*.safetensors")):
            if re.fullmatch(rf"{name}_\d+x\d+\w*\.safetensors", path.name):
                yield from _forward(model, path, device)
            elif path.name.startswith(f"{name}_intermediates_"):
                yield from _intermediates(model, path, device)
            elif path.name.startswith(f"{name}_grads_"):
                yield from _gradients(model, path, device)
    parts: dict[str, Callable[[Path, torch.device], Iterator[Check]]] = {
        "simvq_98304*.safetensors": _quantizer,
        "simvq_rotation*.safetensors": _rotation,
        "noise_injection*.safetensors": _noise,
        "patchgan*.safetensors": _discriminator,
    }
    for pattern, part in parts.items():
        for path in sorted(directory.glob(pattern)):
            if not path.name.endswith("_grads.safetensors"):
                yield from part(path, device)
    for name, mllm in recorded_mllms(directory, device):
        for compared in (compared_batches, compared_generations):
            for quantity in compared(mllm, directory, name, device):
                is_exact = not quantity.recorded.is_floating_point()
                yield (_compare_exactly if is_exact else _compare)(*quantity)


def _compare(path: Path, quantity: str, ours: Tensor | None, recorded: Tensor) -> Check:
    assert ours is not None, quantity
    _check_shapes(path, quantity, ours, recorded)
    ours, recorded = ours.detach().double().cpu(), recorded.double()
    scale = recorded.abs().max().clamp_min(1e-12)
    return Check(path.name, quantity, float((ours - recorded).abs().max() / scale))


def _compare_exactly(path: Path, quantity: str, ours: Tensor, recorded: Tensor) -> Check:
    _check_shapes(path, quantity, ours, recorded)
    return Check(path.name, quantity, float((ours.cpu() != recorded).double().mean()), is_index=True)


def _check_shapes(path: Path, quantity: str, ours: Tensor, recorded: Tensor) -> None:
    if ours.shape != recorded.shape:
        raise ValueError(
            f"{path.name}: {quantity} is {tuple(ours.shape)} here, {tuple(recorded.shape)} there."
        )


def _compare_indices(path: Path, quantity: str, ours: Tensor, recorded: Tensor, margin: Tensor) -> Check:
    differs = (ours.cpu() != recorded) & (margin > MARGIN)
    return Check(path.name, quantity, float(differs.double().mean()), is_index=True)


def _images(tensors: dict[str, Tensor], device: torch.device) -> Tensor:
    return tensors["image_u8"].to(device).float() / 127.5 - 1


@torch.no_grad()
def _forward(model: DualViTok, path: Path, device: torch.device) -> Iterator[Check]:
    """One recorded pass; the decoder is also run from the recorded features, so that a near-tie stays local."""
    recorded = load_file(path)
    images = _images(recorded, device)
    output = model(images)
    encoded = output.encoded
    latents, _ = model.latents(images)
    assert model.pixel_encoder is not None
    ours = {"pixel_encoder_out": model.pixel_encoder(images), "semantic_target": encoded.semantic_target}
    indices_equal = True
    for name, quantized in (("semantic", encoded.semantic), ("pixel", encoded.pixel)):
        check = _compare_indices(
            path,
            f"{name}_indices",
            quantized.indices,
            recorded[f"{name}_indices"],
            recorded[f"{name}_margin"],
        )
        indices_equal &= bool((quantized.indices.cpu() == recorded[f"{name}_indices"]).all())
        yield check
        ours[f"{name}_prequant"] = latents[name]
        if indices_equal:
            ours[f"{name}_quant"] = quantized.features
            ours[f"{name}_commit_loss"] = quantized.loss
    if indices_equal:
        ours["merged"] = model.merge(encoded.semantic.features, encoded.pixel.features, encoded.grid)
        ours["semantic_reconstruction"] = output.semantic_reconstruction
        yield from _pixels(path, "", output.reconstruction, recorded)
    yield from _pixels(path, " from recorded features", model.decode(recorded["merged"].to(device)), recorded)
    for quantity, value in ours.items():
        yield _compare(path, quantity, value, recorded[quantity])
    for name in ("semantic", "pixel"):
        features = model.quantizers[name].codes_to_features(recorded[f"{name}_indices"].long().to(device))
        yield _compare(path, f"{name} codes -> features", features, recorded[f"{name}_quant"])


def _pixels(path: Path, suffix: str, ours: Tensor, recorded: dict[str, Tensor]) -> Iterator[Check]:
    for quantity, step in (("reconstruction", 1), ("reconstruction_s4", 4)):
        if quantity in recorded:
            yield _compare(path, quantity + suffix, ours[:, :, ::step, ::step], recorded[quantity])


@torch.no_grad()
def _intermediates(model: DualViTok, path: Path, device: torch.device) -> Iterator[Check]:
    recorded = load_file(path)
    size = re.search(r"\d+x\d+", path.name)
    if size is None:
        raise ValueError(f"{path.name} names no size: expected NAME_intermediates_HxW.safetensors.")
    name = path.name.split("_intermediates_")[0]
    images = _images(load_file(path.with_name(f"{name}_{size.group()}.safetensors")), device)
    seen: dict[str, Tensor] = {"scaling_layer.image": patchify(images)[0]}
    modules = dict(model.named_modules())
    hooks = []
    for quantity in recorded:
        module = modules.get(quantity)
        if module is not None:
            hooks.append(module.register_forward_hook(lambda _m, _i, out, q=quantity: seen.update({q: out})))
    model(images)
    for hook in hooks:
        hook.remove()
    for quantity, value in recorded.items():
        yield _compare(path, quantity, seen[quantity], value)


def _gradients(model: DualViTok, path: Path, device: torch.device) -> Iterator[Check]:
    recorded = load_file(path)
    images_file = json.loads(path.with_suffix(".json").read_text())
    images = _images(load_file(path.with_name(images_file["image"].split(":")[0])), device)
    model.zero_grad()
    output = model(images)
    encoded = output.encoded
    cosine = torch.nn.functional.cosine_similarity(
        output.semantic_reconstruction, encoded.semantic_target, dim=1
    )
    loss = torch.nn.functional.mse_loss(images, output.reconstruction)
    loss = loss + encoded.pixel.loss + encoded.semantic.loss + (1 - cosine).mean()
    loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    yield _compare(path, "loss", loss, torch.tensor(images_file["loss"]))
    for quantity, value in recorded.items():
        yield _compare(path, quantity, gradients[quantity], value)
    norms = {quantity: torch.tensor(value["l2"]) for quantity, value in images_file["grads"].items()}
    # Some gradients are zero but for rounding, as of a bias that the next norm takes away again: below this
    # share of the whole gradient's norm only the absolute difference counts.
    floor = 1e-3 * torch.stack(list(norms.values())).norm()
    for quantity, norm in norms.items():
        error = (gradients[quantity].norm().cpu() - norm).abs() / norm.clamp_min(floor)
        yield Check(path.name, f"{quantity} l2", float(error))
    unexpected = sorted(gradients.keys() & set(images_file["params_without_grad"]))
    if unexpected:
        raise ValueError(f"{path.name}: {unexpected[0]} has a gradient here and none in the official model.")
    model.zero_grad()


def _quantizer(path: Path, device: torch.device) -> Iterator[Check]:
    recorded = load_file(path)
    with safe_open(path, "pt") as file:
        is_recipe = "torch.manual_seed(7)" in (file.metadata() or {}).get("recipe", "")
    if not is_recipe:
        raise ValueError(f"{path.name}: its metadata names no codebook recipe that is known here.")
    quantizer = SimVQ(98304, 32)
    generator = torch.Generator().manual_seed(7)
    codebook = torch.randn(98304, 32, generator=generator) * 32**-0.5
    quantizer.load_state_dict(
        {"frozen_codebook": codebook, "code_transform.weight": recorded["code_transform_weight"]}
    )
    quantizer = quantizer.to(device)
    x = recorded["x"].to(device).requires_grad_()
    quantized = quantizer(x)
    yield _compare(path, "codebook", codebook[:8], recorded["frozen_codebook_first8"])
    yield _compare_indices(path, "indices", quantized.indices, recorded["indices"], recorded["margin"])
    yield _compare(path, "quant", quantized.features, recorded["quant"])
    yield _compare(path, "commit_loss", quantized.loss, recorded["commit_loss"])
    gradients = path.with_name(path.stem + "_grads.safetensors")
    if gradients.is_file():
        weights = torch.arange(x.numel(), device=device).reshape(x.shape) % 7
        (quantized.loss + (quantized.features * weights).mean()).backward()
        expected = load_file(gradients)
        yield _compare(gradients, "grad_x", x.grad, expected["grad_x"])
        weight = quantizer.code_transform.weight
        yield _compare(gradients, "grad_code_transform", weight.grad, expected["grad_code_transform"])


def _rotation(path: Path, device: torch.device) -> Iterator[Check]:
    recorded = load_file(path)
    codebook = recorded["codebook"]
    quantizer = SimVQ(codebook.shape[0], codebook.shape[1], rotation_trick=True)
    quantizer.load_state_dict(
        {"frozen_codebook": codebook, "code_transform.weight": recorded["code_transform_weight"]}
    )
    quantizer = quantizer.to(device)
    x = recorded["x"].to(device).requires_grad_()
    quantized = quantizer(x)
    (quantized.features**3).sum().backward()
    yield _compare(path, "quant", quantized.features, recorded["quant"])
    yield _compare(path, "grad_x", x.grad, recorded["grad_x"])


def _noise(path: Path, device: torch.device) -> Iterator[Check]:
    recorded = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    features = recorded["quant_pixel_in"].to(device)
    recordings: tuple[tuple[NoiseKind, str], ...] = (("neighbour", "out_random"), ("zero", "out_zero"))
    for kind, quantity in recordings:
        seed = int(re.sub(r"\D", "", metadata["seed"]))
        noise = TokenNoise(kind, float(metadata["pixel_drop_batch_rate"]), float(metadata["pixel_drop_rate"]))
        generator = torch.Generator().manual_seed(seed)
        out = noise(features, features.new_zeros(1, features.shape[1]), generator=generator)
        yield _compare(path, quantity, out, recorded[quantity])


def _discriminator(path: Path, device: torch.device) -> Iterator[Check]:
    recorded = load_file(path)
    prefix = "state_dict."
    state = {key.removeprefix(prefix): v for key, v in recorded.items() if key.startswith(prefix)}
    width = state["main.0.weight"].shape[0]
    discriminator = PatchDiscriminator(width=width)
    discriminator.load_state_dict(state)
    discriminator = discriminator.eval().to(device)
    real, fake = (recorded[key].to(device).float() / 127.5 - 1 for key in ("real_u8", "fake_u8"))
    for mode in ("eval", "train"):
        discriminator.train(mode == "train")
        yield _compare(path, f"logits_real_{mode}", discriminator(real), recorded[f"logits_real_{mode}"])
        yield _compare(path, f"logits_fake_{mode}", discriminator(fake), recorded[f"logits_fake_{mode}"])
    after = discriminator.state_dict()
    for quantity, value in recorded.items():
        if quantity.startswith("after_train_real_then_fake."):
            key = quantity.removeprefix("after_train_real_then_fake.")
            yield _compare(path, f"after training: {key}", after[key], value)
