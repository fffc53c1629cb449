"""Bringing a picture to a size that the model knows, and its edited copy back to the picture's own."""

from typing import NamedTuple

from PIL import Image

from illume_lightning.resolution import Size


class Fitted(NamedTuple):
    """A picture that was scaled to fit inside a size and centred on white (official release).

    Args:
        image: RGB, of that size.
        box: left, top, right and bottom of the picture in it, in pixels.
        original: height and width that the picture had.
    """

    image: Image.Image
    box: tuple[int, int, int, int]
    original: Size


def fit_inside(image: Image.Image, size: Size) -> Fitted:
    """Scale an RGB picture as large as it fits inside a height and width; where its ratio is theirs, all is filled."""
    height, width = size
    scale = min(width / image.width, height / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    canvas = Image.new("RGB", (width, height), "white")
    canvas.paste(image.resize(inner, Image.Resampling.LANCZOS) if inner != image.size else image, (left, top))
    return Fitted(canvas, (left, top, left + inner[0], top + inner[1]), (image.height, image.width))


def restore(result: Image.Image, fitted: Fitted) -> Image.Image:
    """Cut the margins off a result, at whatever scale it is, and bring it to the picture's own size."""
    across, down = result.width / fitted.image.width, result.height / fitted.image.height
    left, top, right, bottom = fitted.box
    height, width = fitted.original
    box = (left * across, top * down, right * across, bottom * down)
    if (width, height) == result.size and box == (0, 0, *result.size):
        return result
    return result.resize((width, height), Image.Resampling.LANCZOS, box=box)
