"""Encoded images to pixels at a bucket's size, and the augmentation, keyed by sample number."""

import io

import numpy as np
from PIL import Image, ImageOps

from illume_lightning.resolution import Size


def decode_at(data: bytes, size: Size, *, stretch: bool = False, flip: bool = False) -> np.ndarray:
    """Decode an image and bring it to a size.

    The image is scaled to cover `size` and its centre is kept, in one resampling (bicubic with antialiasing,
    as the official release's processor), so the aspect ratio stays exact to a fraction of a pixel. An image
    that has the size already is not resampled.

    Args:
        data: an image of a store: JPEG, PNG or WebP.
        size: height and width of the result, in pixels.
        stretch: scale height and width independently instead, and keep everything (the official release at
            any resolution, where `size` is the image's own size rounded to multiples of 16).
        flip: mirror left and right.

    Returns:
        RGB, uint8 (3, H, W), 0 to 255; a read-only view.

    Raises:
        OSError, SyntaxError, ValueError: if the bytes are damaged.
    """
    height, width = size
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as file:
        image = file if file.mode == "RGB" else file.convert("RGB")
        if image.size != (width, height):
            if stretch:
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            else:
                image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # Row by row, each as its red, green and blue pixels: planes come out of this by copying whole rows,
        # which is much faster than pixel by pixel.
        rows = np.frombuffer(image.tobytes("raw", "RGB;L"), dtype=np.uint8)
        return rows.reshape(height, 3, width).transpose(1, 0, 2)


def is_flipped(seed: int, sample_number: int, probability: float) -> bool:
    """Whether a sample is mirrored: random, and the same wherever and whenever the sample is read.

    Args:
        seed: of the run, not negative.
        sample_number: running number of the sample in the run.
        probability: 0 to 1.
    """
    if probability <= 0:
        return False
    return np.random.Generator(np.random.Philox(key=[seed, sample_number])).random() < probability
