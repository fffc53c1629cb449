"""Training losses of DualViTok: pixels, perception, adversary, codebooks and semantics (paper 3.1).

Shapes: B batch, H W picture height and width in pixels, C semantic channels, h1 w1 semantic grid.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from illume_lightning.nn.dualvitok import DualViTokOutput
from illume_lightning.nn.plain_file import load_plain

PixelLoss = Literal["l1", "l2", "l1_l2"]
Average = Callable[[Tensor], Tensor]
"""Mean of a tensor without gradient over all devices, where several share a batch."""


class Perceptual(nn.Module):
    """LPIPS on VGG16, frozen and always in evaluation mode.

    The official release trains with the heads' dropout on, by an oversight; here it is off. The heads come
    with the ``lpips`` package, the backbone is torchvision's ImageNet VGG16. Nothing is downloaded.

    Args:
        backbone_weights: file with torchvision's ``vgg16`` state dict; ``None`` takes ``vgg16-397923af.pth``
            from torch hub's cache, where torchvision puts it.

    Raises:
        FileNotFoundError: where the file is missing.
        ValueError: where it is not a state dict of torchvision's VGG16.
    """

    network: Any

    def __init__(self, backbone_weights: str | None = None) -> None:
        super().__init__()
        self.network = _lpips(_find_backbone(backbone_weights))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Perceptual":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Distances (B,) between pictures (B, 3, H, W) in [-1, 1]."""
        scale = self.network.scaling_layer
        ours, theirs = self.network.net(scale(reconstruction)), self.network.net(scale(images))
        # The package's own forward takes the square root of a sum of squares, whose gradient is NaN at a
        # position where every channel is zero.
        per_layer = [
            head.model[-1]((_unit(a) - _unit(b)).square()).mean((1, 2, 3))
            for head, a, b in zip(self.network.lins, ours, theirs, strict=True)
        ]
        return torch.stack(per_layer).sum(0)


def _unit(features: Tensor) -> Tensor:
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)


def _find_backbone(path: str | None) -> Path:
    file = Path(path) if path else Path(torch.hub.get_dir()) / "checkpoints" / "vgg16-397923af.pth"
    if not file.is_file():
        raise FileNotFoundError(
            f"the perceptual loss needs torchvision's VGG16 weights and there is no file {file}: give the "
            "path of vgg16-397923af.pth as backbone_weights, or train without this loss by "
            "perceptual_weight: 0 and perceptual: null."
        )
    return file


def _lpips(backbone: Path) -> nn.Module:
    """An LPIPS network with the package's heads and the backbone of a file."""
    import lpips

    with warnings.catch_warnings(), torch.device("meta"):
        # The package passes torchvision arguments of an older version.
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    heads = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    weights, vgg = load_plain(heads), load_plain(backbone)
    if not isinstance(vgg, dict):
        raise ValueError(f"{backbone} is no state dict of torchvision's vgg16 but a {type(vgg).__name__}.")
    state = {}
    for key, value in network.state_dict().items():
        part, *rest = key.split(".")
        if part == "net":
            # lpips: net.slice3.12.weight; torchvision: features.12.weight
            source = vgg.get(".".join(["features", *rest[1:]]))
        elif part == "lins":
            source = weights[".".join([f"lin{rest[0]}", *rest[1:]])]
        else:
            source = weights.get(key, value)
        if source is None or source.shape != value.shape:
            raise ValueError(
                f"{backbone} is no state dict of torchvision's vgg16: {key} needs a tensor of shape "
                f"{tuple(value.shape)}, the file has {None if source is None else tuple(source.shape)}."
            )
        state[key] = source
    network.load_state_dict(state, assign=True)
    return network


class DualViTokLoss(nn.Module):
    """Weighted sum of the tokenizer's losses, for the generator and for the discriminator.

    Generator: pixel + perceptual + adversarial + codebook losses of both branches + semantic cosine.
    Discriminator: hinge loss. Terms are computed in fp32.

    Args:
        pixel_loss: ``l1`` (paper), ``l2``, the mean squared error (official release), or ``l1_l2``, their sum.
        pixel_weight: of the pixel loss.
        perceptual_weight: of LPIPS; 0 leaves it out.
        adversarial_weight: of the GAN loss, generator and discriminator (official release: 0.5); 0 leaves it
            out.
        adversarial_start: training steps before the GAN loss sets in (official release: 20,000).
        adaptive_weight: scale the generator's GAN loss by the ratio of gradient norms at the decoder's last
            layer (VQGAN; official release: off).
        codebook_weight: of both branches' codebook losses.
        semantic_weight: of the cosine distance to the vision tower's features.
        foreground_weight: how many times as much a pixel counts that differs from the picture's background, see
            ``foreground``; 1 is the paper's. For small worlds whose pictures are mostly empty.

    Raises:
        ValueError: for another pixel loss, or a negative weight.
    """

    def __init__(
        self,
        pixel_loss: PixelLoss = "l1",
        pixel_weight: float = 1.0,
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.5,
        adversarial_start: int = 20000,
        adaptive_weight: bool = False,
        codebook_weight: float = 1.0,
        semantic_weight: float = 1.0,
        foreground_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if pixel_loss not in get_args(PixelLoss):
            raise ValueError(f"pixel_loss is {pixel_loss!r}, expected {', '.join(get_args(PixelLoss))}.")
        weights = {
            "pixel_weight": pixel_weight,
            "perceptual_weight": perceptual_weight,
            "adversarial_weight": adversarial_weight,
            "codebook_weight": codebook_weight,
            "semantic_weight": semantic_weight,
            "foreground_weight": foreground_weight,
        }
        for name, value in weights.items():
            if value < 0:
                raise ValueError(f"{name} is {value}: a weight can't be negative; 0 leaves the term out.")
        self.pixel_loss = pixel_loss
        self.pixel_weight = pixel_weight
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.adaptive_weight = adaptive_weight
        self.codebook_weight = codebook_weight
        self.semantic_weight = semantic_weight
        self.foreground_weight = foreground_weight

    def is_adversarial(self, step: int) -> bool:
        """Whether the GAN loss is on in a training step, counted from 0."""
        return self.adversarial_weight > 0 and step >= self.adversarial_start

    def generator(
        self,
        images: Tensor,
        output: DualViTokOutput,
        perceptual: nn.Module | None = None,
        fake_logits: Tensor | None = None,
        last_layer: Tensor | None = None,
        average: Average = lambda tensor: tensor,
    ) -> dict[str, Tensor]:
        """Loss of the tokenizer.

        Args:
            images: (B, 3, H, W) in [-1, 1].
            output: the tokenizer's forward pass on them.
            perceptual: network that gives distances (B,) of two batches of pictures.
            fake_logits: the discriminator's logits of the reconstruction; ``None`` while the GAN loss is off.
            last_layer: decoder weight at which ``adaptive_weight`` compares gradients.
            average: over devices: the means of their losses are then one device's loss of the whole batch.

        Returns:
            Scalars, each without its weight except ``loss``: their weighted sum, to differentiate.

        Raises:
            ValueError: where ``perceptual`` or ``last_layer`` is missing and its option is on.
        """
        reconstruction = output.reconstruction.float()
        terms = {"pixel_loss": self._pixel_distance(reconstruction, images.float(), average)}
        loss = self.pixel_weight * terms["pixel_loss"]
        if self.perceptual_weight > 0:
            if perceptual is None:
                raise ValueError(
                    f"perceptual_weight is {self.perceptual_weight} and there is no perceptual network: give "
                    "one, or set the weight to 0."
                )
            terms["perceptual_loss"] = perceptual(reconstruction, images).float().mean()
            loss = loss + self.perceptual_weight * terms["perceptual_loss"]
        if fake_logits is not None:
            weight = self._adversarial(loss, fake_logits, last_layer, terms, average)
            loss = loss + weight * terms["adversarial_loss"]
        encoded = output.encoded
        for name, quantized in (("semantic", encoded.semantic), ("pixel", encoded.pixel)):
            if quantized is not None:
                terms[f"{name}_codebook_loss"] = quantized.loss.float()
                loss = loss + self.codebook_weight * terms[f"{name}_codebook_loss"]
        if output.semantic_reconstruction is not None and encoded.semantic_target is not None:
            semantic = cosine_loss(output.semantic_reconstruction, encoded.semantic_target)
            terms["semantic_loss"] = semantic
            loss = loss + self.semantic_weight * semantic
        return {"loss": loss} | terms

    def _pixel_distance(self, reconstruction: Tensor, images: Tensor, average: Average) -> Tensor:
        error = (reconstruction - images).abs()
        if self.pixel_loss == "l2":
            error = error.square()
        elif self.pixel_loss == "l1_l2":
            error = error + error.square()
        if self.foreground_weight == 1:
            return error.mean()
        weight = 1 + (self.foreground_weight - 1) * foreground(images)
        return (error * weight).mean() / average(weight.mean())

    def _adversarial(
        self,
        loss: Tensor,
        fake_logits: Tensor,
        last_layer: Tensor | None,
        terms: dict[str, Tensor],
        average: Average,
    ) -> float | Tensor:
        """Add the GAN loss to ``terms`` and return its weight."""
        terms["adversarial_loss"] = hinge_generator_loss(fake_logits)
        if not self.adaptive_weight:
            return self.adversarial_weight
        if last_layer is None:
            raise ValueError("adaptive_weight compares gradients at last_layer, which is missing.")
        terms["adaptive_weight"] = adaptive_weight(loss, terms["adversarial_loss"], last_layer, average)
        return self.adversarial_weight * terms["adaptive_weight"]

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> dict[str, Tensor]:
        """Loss of the discriminator from logits of any shape, the fake ones of detached reconstructions.

        Returns:
            ``discriminator_loss``, with its weight, to differentiate, and both logits' means.
        """
        loss = self.adversarial_weight * hinge_discriminator_loss(real_logits, fake_logits)
        return {
            "discriminator_loss": loss,
            "real_logits": real_logits.detach().float().mean(),
            "fake_logits": fake_logits.detach().float().mean(),
        }


def foreground(images: Tensor, threshold: float = 0.2) -> Tensor:
    """Where pictures differ from their background, the median colour of their outermost pixels.

    Args:
        images: (B, 3, H, W) in [-1, 1].
        threshold: least difference, in any channel, that counts.

    Returns:
        (B, 1, H, W), 1 in front and 0 behind.
    """
    edges = [images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]]
    background = torch.cat(edges, dim=2).median(dim=2).values[:, :, None, None]
    return ((images - background).abs().amax(1, keepdim=True) > threshold).to(images.dtype)


def cosine_loss(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine over positions of (B, C, h1, w1); () fp32, no gradient to the target.

    Zero vectors count as orthogonal; in the official release they make NaN.
    """
    return (1 - F.cosine_similarity(reconstruction.float(), target.detach().float(), dim=1)).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """Minus the mean logit of reconstructions: ()."""
    return -fake_logits.float().mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the sum of mean relu(1 - real) and mean relu(1 + fake): ()."""
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def adaptive_weight(
    reconstruction_loss: Tensor,
    adversarial_loss: Tensor,
    last_layer: Tensor,
    average: Average = lambda tensor: tensor,
) -> Tensor:
    """VQGAN's weight of the GAN loss: () in [0, 10^4], detached.

    The ratio of the two losses' gradient norms at ``last_layer``, of gradients averaged over devices: the norm of a
    mean is not the mean of norms.
    """
    numerator, denominator = (
        average(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()).norm()
        for loss in (reconstruction_loss, adversarial_loss)
    )
    return (numerator / (denominator + 1e-4)).clamp(0, 1e4).detach()
