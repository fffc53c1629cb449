"""Image bytes of any origin to canonical RGB, and canonical bytes to pixels.

Canonical means: JPEG, PNG or WebP bytes that decode to one upright 8-bit RGB picture. Bytes that are
canonical already are kept as they are, so that a JPEG is never compressed twice; every other picture is
written again as PNG, without loss. Color profiles (ICC) are not applied.
"""

import io
import struct
import warnings
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Raster formats only: Pillow also opens formats that start other programs (EPS) or have no fixed size.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
)
_KEPT_FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP"})  # MPO: a JPEG with further pictures behind it
_MODE_NAMES = {"1": "gray", "L": "gray", "LA": "gray", "P": "palette", "PA": "palette"}
_ORIENTATION_TAG = 0x0112
MAX_PIXELS = 2 * (1024 * 1024 * 1024 // 4 // 3)
"""178,956,970: where Pillow itself refuses an image."""

_MAX_SCANS = 500  # of a progressive JPEG, as libjpeg-turbo's own tools; encoders write about 10
_SCAN = b"\xff\xda"  # begins each; in the data of a picture, a zero follows ff

# What Pillow's decoders raise on damaged bytes, found by cutting and overwriting files of every format.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, LookupError, TypeError,
          RuntimeError, ArithmeticError, AssertionError, MemoryError)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """Which images are kept, and at which size. Sides are in pixels.

    Args:
        min_side: Images with a shorter side below this are dropped.
        max_side: Images with a longer side above this are stored smaller, so that the longer side is
            `max_side`; None keeps every size.
        max_pixels: Images with more pixels (height x width) are dropped before they are decoded.

    Raises:
        ValueError: If a limit is out of range.
    """

    min_side: int = 16
    max_side: int | None = None
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise ValueError(f"min_side is {self.min_side}; it must be at least 1 pixel")
        if self.max_side is not None and self.max_side < self.min_side:
            raise ValueError(f"max_side is {self.max_side}, below min_side {self.min_side}; raise max_side")
        if not 1 <= self.max_pixels <= MAX_PIXELS:
            raise ValueError(f"max_pixels is {self.max_pixels}; it must be between 1 and {MAX_PIXELS}")


@dataclass(frozen=True)
class CanonicalImage:
    """An image that `decode` reads: encoded bytes, size in pixels, and what was changed to get there.

    `converted` names the changes ("alpha", "gray", "rotated", ...); it is empty if `data` is the original.
    """

    data: bytes
    height: int
    width: int
    converted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dropped:
    """An image that is left out, and why."""

    reason: str


def canonical(data: bytes, limits: Limits = Limits()) -> CanonicalImage | Dropped:
    """Turn image bytes of any kind into canonical RGB bytes, or say why they cannot be used.

    Gray, palette, CMYK and 16-bit pictures become 8-bit RGB, transparency is composited on white, the EXIF
    orientation is applied, and of an animation the first frame is taken. Every pixel is decoded once, so
    damaged files are found here and not in training.

    Args:
        data: An encoded image.
        limits: Which images are kept, and at which size.

    Returns:
        The canonical image, or `Dropped` with one of the reasons "empty", "unreadable", "damaged",
        "too many pixels", "too many scans", "side below N px", "values not finite".
    """
    if not data:
        return Dropped("empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images and odd EXIF; both are handled here
        loaded = _load(data, limits)
        if isinstance(loaded, Dropped):
            return loaded
        image, converted = loaded
        rgb = _to_rgb(image, converted)
    if isinstance(rgb, Dropped):
        return rgb
    scale = 1.0 if limits.max_side is None else limits.max_side / max(rgb.size)
    if scale < 1:
        size = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
        converted.append("downscaled")
    if min(rgb.size) < limits.min_side:
        return Dropped(f"side below {limits.min_side} px")
    if not converted:
        return CanonicalImage(data, rgb.height, rgb.width)
    return CanonicalImage(encode_png(np.asarray(rgb)), rgb.height, rgb.width, tuple(converted))


def decode(data: bytes) -> np.ndarray:
    """Decode canonical bytes.

    Args:
        data: Bytes made by `canonical` or `encode_png`.

    Returns:
        RGB pixels, uint8 (H, W, 3), 0 to 255, writable.
    """
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
        return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def encode_png(pixels: np.ndarray, compress_level: int = 3) -> bytes:
    """Encode RGB pixels without loss.

    Args:
        pixels: RGB, uint8 (H, W, 3), 0 to 255.
        compress_level: 0 (fast, large) to 9 (slow, small). 3 takes half the time of Pillow's default, 6,
            for photographs that are 4 % larger.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


def _load(data: bytes, limits: Limits) -> tuple[Image.Image, list[str]] | Dropped:
    """Open, check the header against the limits, decode the first frame and turn it upright."""
    converted: list[str] = []
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > limits.max_pixels:
            return Dropped("too many pixels")
        if min(image.size) < limits.min_side:
            return Dropped(f"side below {limits.min_side} px")
        if image.format not in _KEPT_FORMATS:
            converted.append(f"{image.format} file")
        if image.format == "PNG" and data[24] == 16:  # bits per sample, in the header chunk
            converted.append("16-bit")
        if image.info.get("progressive") and data.count(_SCAN) > _MAX_SCANS:
            return Dropped("too many scans")
        if image.format != "MPO" and getattr(image, "is_animated", False):  # n_frames would walk through them
            converted.append("animated")
        if limits.max_side is not None and max(image.size) > limits.max_side:
            scale = limits.max_side / max(image.size)
            # JPEG only: decode at 1/2, 1/4 or 1/8, still no smaller than asked for.
            image.draft(None, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        image.load()
        if image.getexif().get(_ORIENTATION_TAG, 1) in range(2, 9):
            image = ImageOps.exif_transpose(image)
            converted.append("rotated")
    except Image.DecompressionBombError:
        return Dropped("too many pixels")
    except UnidentifiedImageError:
        return Dropped("unreadable")
    except DAMAGE:
        return Dropped("damaged")
    return image, converted


def _to_rgb(image: Image.Image, converted: list[str]) -> Image.Image | Dropped:
    """Convert a decoded image of any mode to RGB, and add the names of the changes to `converted`."""
    if image.mode == "La":  # premultiplied; Pillow converts it to no other mode
        image = image.convert("LA")
    mode = image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        gray = _to_8_bit(np.asarray(image))
        if "16-bit" not in converted:
            converted.append("16-bit" if mode != "F" else "float")
        return gray if isinstance(gray, Dropped) else Image.fromarray(gray).convert("RGB")
    if mode in _MODE_NAMES:
        converted.append(_MODE_NAMES[mode])
    elif mode not in ("RGB", "RGBA"):
        converted.append(mode)
    if image.has_transparency_data:
        converted.append("alpha")
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _to_8_bit(values: np.ndarray) -> np.ndarray | Dropped:
    """Scale gray values to 0..255.

    Integers are read as 16-bit (0..65535); floats as 0..1, or as 0..255 if they go beyond 1. Where values
    lie outside these ranges, the lowest becomes 0 and the highest 255.

    Args:
        values: (H, W) of any integer or float type.

    Returns:
        uint8 (H, W).
    """
    gray = values.astype(np.float64)
    if not np.isfinite(gray).all():
        return Dropped("values not finite")
    low, high = float(gray.min()), float(gray.max())
    tops = (1.0, 255.0) if values.dtype.kind == "f" else (65535.0,)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    if top is None:
        gray, top = gray - low, high - low
    return np.round(gray * (255.0 / top)).astype(np.uint8)
