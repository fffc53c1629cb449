"""Images that somebody made to harm, or that a disk broke: dropped with a reason, at once, or a picture in bounds."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import GifImagePlugin, Image, TiffImagePlugin

from illume_lightning.data.image import DAMAGE, CanonicalImage, Dropped, Limits, canonical, decode
from illume_lightning.data.transform import decode_at

LIMITS = Limits(max_pixels=10**6)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 48, width: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (64, 48), pixels: bytes | None = None) -> bytes:
    """A PNG of RGB pixels with extra chunks in front of them."""
    rows = (b"\0" + bytes(3 * size[0])) * size[1] if pixels is None else pixels
    header = struct.pack(">IIBBBBB", *size, 8, 2, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in every
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


# -- cut --

CUT = {
    "jpeg": encoded(noise(), "JPEG"),
    "progressive": encoded(noise(), "JPEG", progressive=True),
    "png": encoded(noise(), "PNG"),
    "webp": encoded(noise(), "WEBP"),
    "lossless": encoded(noise(), "WEBP", lossless=True),
}


@pytest.mark.parametrize("name", CUT)
def test_cut_at_every_tenth(name: str) -> None:
    data = CUT[name]
    assert isinstance(canonical(data), CanonicalImage)
    for tenth in range(10):
        cut = data[: len(data) * tenth // 10]
        assert isinstance(canonical(cut), Dropped), tenth
        with pytest.raises(DAMAGE):
            decode_at(cut, (32, 32))


# -- bombs --

BOMB = zlib.compress(bytes(2**26), 9)  # 64 KB that become 64 MB
JPEG = encoded(Image.new("RGB", (64, 48), (10, 20, 30)), "JPEG", progressive=True)
SCANS = JPEG[:-2] + JPEG[JPEG.rindex(b"\xff\xda") : -2] * 600 + b"\xff\xd9"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(size=(2**31 - 1, 2**31 - 1), pixels=b""), "too many pixels"),
        (png(size=(50_000, 50_000), pixels=b""), "too many pixels"),
        (png(size=(990, 1000), pixels=b"\0"), "damaged"),
        (png((b"zTXt", b"k\0\0" + BOMB)), "damaged"),
        (png((b"iTXt", b"k\0\1\0\0\0" + BOMB)), "damaged"),
        (png((b"iCCP", b"k\0\0" + BOMB)), "damaged"),
        (SCANS, "too many scans"),
    ],
    ids=["largest", "large", "little data", "text", "international text", "profile", "scans"],
)
def test_bombs(data: bytes, reason: str) -> None:
    assert canonical(data, LIMITS) == Dropped(reason)


def test_an_animation_that_says_it_is_endless() -> None:
    result = canonical(png((b"acTL", struct.pack(">II", 2**31 - 1, 0))), LIMITS)
    assert isinstance(result, CanonicalImage) and result.converted == ("animated",)


@pytest.mark.parametrize(
    ("kind", "plugin"), [("GIF", GifImagePlugin.GifImageFile), ("TIFF", TiffImagePlugin.TiffImageFile)]
)
def test_of_many_frames_at_most_two_are_looked_at(
    kind: str, plugin: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [Image.new("L", (16, 16), n % 256) for n in range(400)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    seen, seek = [], plugin._seek
    monkeypatch.setattr(
        plugin, "_seek", lambda self, frame, *rest: seen.append(frame) or seek(self, frame, *rest)
    )
    result = canonical(data)
    assert isinstance(result, CanonicalImage) and "animated" in result.converted
    assert max(seen) <= 1 and len(seen) <= 5
    assert not decode(result.data).any()


def test_pages_that_go_in_circles() -> None:
    data = bytearray(encoded(noise(), "TIFF"))
    (first,) = struct.unpack("<I", data[4:8])
    (count,) = struct.unpack("<H", data[first : first + 2])
    end = first + 2 + 12 * count
    data[end : end + 4] = struct.pack("<I", first)  # the page after the first is the first
    assert isinstance(canonical(bytes(data)), CanonicalImage | Dropped)


# -- values --


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    values = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)
    values[3, 5] = bad
    assert canonical(encoded(Image.fromarray(values), "TIFF")) == Dropped("values not finite")


@pytest.mark.parametrize("top", [1e-30, 3e38])
def test_floats_of_any_size_are_scaled(top: float) -> None:
    values = np.linspace(-top, top, 48 * 64, dtype=np.float32).reshape(48, 64)
    result = canonical(encoded(Image.fromarray(values), "TIFF"))
    assert isinstance(result, CanonicalImage)
    pixels = decode(result.data)[..., 0]
    assert (pixels.min(), pixels.max()) == (0, 255)


def test_integers_of_32_bits_are_scaled() -> None:
    values = np.linspace(-(2**31), 2**31 - 1, 48 * 64).astype(np.int32).reshape(48, 64)
    result = canonical(encoded(Image.fromarray(values), "TIFF"))
    assert isinstance(result, CanonicalImage)
    pixels = decode(result.data)[..., 0]
    assert (pixels.min(), pixels.max()) == (0, 255)


# -- descriptions --


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + bytes(100),
        b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 200,
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"\xff",
    ],
    ids=["zeros", "endless", "beyond", "short"],
)
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_garbage_for_a_description(kind: str, exif: bytes) -> None:
    data = encoded(noise(), kind, exif=exif)
    result = canonical(data, LIMITS)
    assert isinstance(result, CanonicalImage | Dropped)
    if isinstance(result, CanonicalImage):
        assert decode(result.data).shape == (48, 64, 3)


def test_a_profile_of_garbage_is_not_looked_at() -> None:
    data = encoded(noise(), "JPEG", icc_profile=b"\xff" * 70_000)
    assert canonical(data) == CanonicalImage(data, 48, 64)


# -- fuzz --

SEEDS = {
    "JPEG": encoded(noise(), "JPEG", quality=70),
    "progressive": encoded(noise(), "JPEG", progressive=True),
    "PNG": encoded(noise(24, 32), "PNG"),
    "palette": encoded(noise(24, 32).quantize(16), "PNG", transparency=0),
    "WEBP": encoded(noise(), "WEBP", quality=60),
    "GIF": encoded(noise(24, 32), "GIF", save_all=True, append_images=[noise(24, 32).rotate(90)]),
    "TIFF": encoded(noise(24, 32), "TIFF"),
    "deflate": encoded(noise(24, 32), "TIFF", compression="tiff_deflate"),
    "AVIF": encoded(noise(), "AVIF"),
}
EDIT = st.tuples(st.floats(0, 1, exclude_max=True), st.booleans(), st.binary(min_size=0, max_size=6))


def edited(data: bytes, edits: list[tuple[float, bool, bytes]]) -> bytes:
    """Bytes overwritten (True) or put in, at shares of the length; nothing put in removes six."""
    for share, overwrites, new in edits:
        place = int(share**2 * len(data))  # headers are hit more often
        data = data[:place] + new + data[place + (len(new) if overwrites else 0 if new else 6) :]
    return data


def holds_for(data: bytes) -> None:
    """An image within the limits, or the documented refusal; whoever reads it gets the same size or known errors."""
    result = canonical(data, LIMITS)
    if isinstance(result, Dropped):
        assert result.reason
    else:
        assert decode(result.data).shape == (result.height, result.width, 3)
        assert min(result.height, result.width) >= LIMITS.min_side
        assert result.height * result.width <= LIMITS.max_pixels
    with suppress(*DAMAGE):
        pixels = decode_at(data, (20, 30))
        assert pixels.shape == (3, 20, 30)


@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(edits=st.lists(EDIT, min_size=1, max_size=4))
def test_edited_files(name: str, edits: list[tuple[float, bool, bytes]]) -> None:
    holds_for(edited(SEEDS[name], edits))


@pytest.mark.slow
@pytest.mark.parametrize("name", SEEDS)
@settings(max_examples=4000, derandomize=True, deadline=None, database=None)
@given(edits=st.lists(EDIT, min_size=1, max_size=12))
def test_many_edited_files(name: str, edits: list[tuple[float, bool, bytes]]) -> None:
    holds_for(edited(SEEDS[name], edits))
