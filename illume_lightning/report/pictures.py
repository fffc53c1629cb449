"""Pictures inside a page."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

LARGEST_SIDE = 1600
"""Pixels; larger pictures are made smaller, so that the page stays light."""

SMALL_SIDE = 256
"""Pixels; smaller pictures are enlarged without smoothing, so that one sees what the model made."""

_MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


@dataclass(frozen=True)
class Picture:
    """A picture file, or why it can't be shown."""

    path: Path
    uri: str = ""
    """The whole picture as a data URI; empty if it can't be shown."""

    width: int = 0
    height: int = 0
    problem: str = ""

    @property
    def is_small(self) -> bool:
        """Whether it is shown enlarged."""
        return max(self.width, self.height) <= SMALL_SIDE


def read_picture(folder: Path, name: str) -> Picture:
    """Read a picture of a record.

    Args:
        folder: that the record lies in; pictures elsewhere are not taken into a page that others will see.
        name: relative to the folder.
    """
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return Picture(path, problem=f"{name} lies outside {folder}")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format in _MEDIA_TYPES and max(width, height) <= LARGEST_SIDE:
                image.load()
                return Picture(path, _uri(_MEDIA_TYPES[image.format], path.read_bytes()), width, height)
            image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=90)
            return Picture(path, _uri("image/jpeg", buffer.getvalue()), image.width, image.height)
    except FileNotFoundError:
        return Picture(path, problem=f"{name} is missing")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return Picture(path, problem=f"{name} is not a readable picture")


def _uri(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
