"""PatchGAN discriminator of the tokenizer's adversarial loss (VQGAN; official release)."""

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of a picture as real or reconstructed.

    Convolutions 4x4: ``num_layers`` that halve the picture and double the channels (eight times ``width`` at
    most), one more at the last resolution, and one to a single channel. Parameter names equal the official
    release's (``main.<index>``). BatchNorm's running statistics are updated by every forward pass in training
    mode.

    Args:
        input_channels: channels of the picture.
        width: channels of the first layer.
        num_layers: halvings; 3 judges patches of 70x70 pixels.
    """

    def __init__(self, input_channels: int = 3, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}: a PatchDiscriminator needs at least 1.")
        layers: list[nn.Module] = [nn.Conv2d(input_channels, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        inputs = width
        for i in range(1, num_layers + 1):
            outputs = width * min(2**i, 8)
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            inputs = outputs
        layers.append(nn.Conv2d(inputs, 1, 4, 1, 1))
        self.main = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] of any type -> logits (B, 1, H', W'), positive for real; 256x256 gives 30x30."""
        return self.main(images.to(next(self.parameters()).dtype))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
