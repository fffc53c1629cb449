"""Pictures fitted to a size and brought back to their own."""

import numpy as np
import pytest
from PIL import Image

from illume_lightning.data.geometry import fit_inside, restore


def ramp(height: int, width: int) -> Image.Image:
    """Red rises from left to right, green from top to bottom."""
    down, across = np.mgrid[0:height, 0:width]
    channels = 255 * across / (width - 1), 255 * down / (height - 1), 0 * across
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize("size", [(112, 112), (64, 256), (240, 80)])
@pytest.mark.parametrize("own", [(112, 112), (100, 37), (51, 300), (701, 700), (30, 90)])
def test_a_picture_comes_back_at_its_own_size_and_place(own, size):
    picture = ramp(*own)
    fitted = fit_inside(picture, size)
    assert (fitted.image.height, fitted.image.width) == size
    for scale in (1, 2):  # the diffusion decoder's results are twice as large
        result = fitted.image.resize((size[1] * scale, size[0] * scale), Image.Resampling.LANCZOS)
        back = restore(result, fitted)
        assert (back.height, back.width) == own
        middle = (
            slice(own[0] // 4, -(own[0] // 4)),
            slice(own[1] // 4, -(own[1] // 4)),
        )  # the canvas is white
        difference = np.asarray(back, dtype=float)[middle] - np.asarray(picture, dtype=float)[middle]
        assert np.abs(difference).mean() < 12


def test_margins_are_white_and_equal_ratios_have_none():
    fitted = fit_inside(Image.new("RGB", (40, 20), "black"), (64, 64))
    pixels = np.asarray(fitted.image)
    assert fitted.box == (0, 16, 64, 48)
    assert (pixels[:16] == 255).all() and (pixels[48:] == 255).all() and (pixels[16:48] == 0).all()
    whole = fit_inside(ramp(56, 56), (112, 112))
    assert whole.box == (0, 0, 112, 112)


def test_a_picture_of_the_size_is_left_as_it_is():
    picture = ramp(64, 96)
    fitted = fit_inside(picture, (64, 96))
    assert np.array_equal(np.asarray(restore(fitted.image, fitted)), np.asarray(picture))
