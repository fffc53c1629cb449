"""Awkward images become canonical RGB or are dropped with a reason; good ones keep their bytes."""

import io
import struct
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image

from illume_lightning.data.image import CanonicalImage, Dropped, Limits, canonical, decode, encode_png

HEIGHT, WIDTH = 40, 60
DEFAULTS = Limits()
PILLOW = int(PIL.__version__.split(".")[0])


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth and asymmetric, so that lossy formats stay close and wrong orientations show."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), 128 + 0 * x], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def accepted(data: bytes, limits: Limits = DEFAULTS) -> tuple[CanonicalImage, np.ndarray]:
    """Make canonical, and check what must hold for every result."""
    result = canonical(data, limits)
    assert isinstance(result, CanonicalImage), result
    pixels = decode(result.data)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (result.height, result.width, 3)
    assert pixels.flags.writeable
    assert canonical(result.data, limits) == CanonicalImage(
        result.data, result.height, result.width
    )  # idempotent
    return result, pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_good_bytes_are_kept(kind: str) -> None:
    image = Image.fromarray(picture())
    data = encoded(image, kind)
    result, pixels = accepted(data)
    assert result == CanonicalImage(data, HEIGHT, WIDTH, ())
    assert np.abs(pixels.astype(int) - picture()).max() <= (0 if kind == "PNG" else 24)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_other_formats_become_png(kind: str) -> None:
    result, pixels = accepted(encoded(Image.fromarray(picture()), kind))
    assert f"{kind} file" in result.converted
    assert result.data.startswith(b"\x89PNG")
    assert np.abs(pixels.astype(int) - picture()).mean() < 8


def test_gray_and_bilevel() -> None:
    gray = Image.fromarray(picture()[..., 0])
    result, pixels = accepted(encoded(gray, "PNG"))
    assert result.converted == ("gray",)
    assert (pixels == np.asarray(gray)[..., None]).all()
    result, pixels = accepted(encoded(gray.point(lambda value: 255 * (value > 100), "1"), "PNG"))
    assert result.converted == ("gray",)
    assert set(np.unique(pixels)) == {0, 255}
    assert accepted(encoded(gray, "JPEG"))[0].converted == ("gray",)


def test_palette_with_and_without_transparency() -> None:
    indices = np.zeros((HEIGHT, WIDTH), np.uint8)
    indices[:, 30:] = 1
    image = Image.fromarray(indices, "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    result, pixels = accepted(encoded(image, "PNG"))
    assert result.converted == ("palette",)
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 59].tolist() == [200, 100, 50]
    result, pixels = accepted(encoded(image, "PNG", transparency=0))
    assert result.converted == ("palette", "alpha")
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 59].tolist() == [200, 100, 50]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_alpha_is_composited_on_white(kind: str) -> None:
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, 20:] = 128
    alpha[:, 40:] = 255
    data = encoded(
        Image.fromarray(np.dstack([picture(), alpha])), kind, **({"lossless": True} if kind == "WEBP" else {})
    )
    result, pixels = accepted(data)
    assert result.converted == ("alpha",)
    share = alpha[..., None] / 255
    assert np.abs(pixels - (share * picture() + (1 - share) * 255)).max() <= 1


def test_gray_alpha_and_transparent_color() -> None:
    gray = picture()[..., 0]
    result, pixels = accepted(encoded(Image.fromarray(np.dstack([gray, np.zeros_like(gray)]), "LA"), "PNG"))
    assert result.converted == ("gray", "alpha")
    assert (pixels == 255).all()
    image = Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3))
    result, pixels = accepted(encoded(image, "PNG", transparency=(1, 2, 3)))
    assert result.converted == ("alpha",)
    assert (pixels == 255).all()


@pytest.mark.skipif(PILLOW < 13, reason="Pillow reads premultiplied gray only from 13 on")
def test_premultiplied_gray() -> None:
    straight = encoded(Image.new("LA", (WIDTH, HEIGHT), (64, 128)), "TIFF")
    tag = b"\x52\x01\x03\x00\x01\x00\x00\x00"  # ExtraSamples: 2 is straight alpha, 1 premultiplied
    result, pixels = accepted(straight.replace(tag + b"\x02", tag + b"\x01"))
    assert result.converted == ("TIFF file", "gray", "alpha")
    assert np.abs(pixels.astype(int) - (64 + 127)).max() <= 1


@pytest.mark.parametrize(
    "mode", ["YCbCr", "LAB"] if PILLOW >= 13 else ["LAB"]
)  # Pillow 12 reads YCbCr as RGB
def test_other_color_spaces(mode: str) -> None:
    assert mode in accepted(encoded(Image.new(mode, (WIDTH, HEIGHT)), "TIFF"))[0].converted


def test_cmyk() -> None:
    image = Image.fromarray(picture()).convert("CMYK")
    data = encoded(image, "JPEG", quality=95)
    result, pixels = accepted(data)
    assert result.converted == ("CMYK",)
    assert np.abs(pixels.astype(int) - picture()).mean() < 6


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    stored = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    result, pixels = accepted(encoded(Image.fromarray(stored), "JPEG", quality=95, exif=exif))
    upright = {
        2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2), 7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored[:, ::-1].transpose(1, 0, 2),
    }[orientation]  # fmt: skip
    assert result.converted == ("rotated",)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 5


def test_upright_exif_keeps_the_bytes() -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    data = encoded(Image.fromarray(picture()), "JPEG", exif=exif)
    assert accepted(data)[0].data == data


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).round().astype(np.uint16)
    result, pixels = accepted(encoded(Image.fromarray(ramp), kind))
    assert "16-bit" in result.converted
    assert (pixels == np.round(ramp / 257.0).astype(np.uint8)[..., None]).all()


def test_16_bit_rgb_png() -> None:
    rows = b"".join(b"\0" + struct.pack(">HHH", 65535, 32768, 256) * WIDTH for _ in range(HEIGHT))
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    result, pixels = accepted(png_file((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))
    assert result.converted == ("16-bit",)
    assert (np.abs(pixels.astype(int) - [255, 128, 1]) <= 1).all()


def png_file(*chunks: tuple[bytes, bytes]) -> bytes:
    body = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize(("top", "kind"), [(1.0, "float"), (255.0, "float"), (1000.0, "float")])
def test_float_images(top: float, kind: str) -> None:
    ramp = np.linspace(0, top, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.float32)
    result, pixels = accepted(encoded(Image.fromarray(ramp), "TIFF"))
    assert kind in result.converted
    assert np.abs(pixels[..., 0] - ramp / top * 255).max() <= 0.51
    ramp[0, 0] = np.nan
    assert canonical(encoded(Image.fromarray(ramp), "TIFF")) == Dropped("values not finite")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (WIDTH, HEIGHT), color) for color in ("red", "blue", "green")]
    result, pixels = accepted(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert "animated" in result.converted
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_truncated_files_are_dropped(kind: str) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), kind)
    for length in (1, 10, len(data) // 4, len(data) // 2):
        assert isinstance(canonical(data[:length]), Dropped), length


def test_other_bytes_are_dropped() -> None:
    assert canonical(b"") == Dropped("empty")
    assert canonical(b"<html>404</html>" * 100) == Dropped("unreadable")
    assert canonical(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n") == Dropped("unreadable")


def test_random_damage_never_raises() -> None:
    random = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = np.frombuffer(encoded(Image.fromarray(picture()), kind), np.uint8)
        for _ in range(60):
            broken = data.copy()
            places = random.integers(0, min(len(data), random.choice([64, len(data)])), 4)
            broken[places] = random.integers(0, 256, 4)
            assert isinstance(canonical(broken.tobytes(), Limits(max_pixels=10**6)), CanonicalImage | Dropped)


def test_small_images_are_dropped() -> None:
    assert canonical(encoded(Image.new("RGB", (1, 1)), "PNG")) == Dropped("side below 16 px")
    assert canonical(encoded(Image.new("RGB", (500, 15)), "PNG")) == Dropped("side below 16 px")
    assert isinstance(canonical(encoded(Image.new("RGB", (500, 16)), "PNG")), CanonicalImage)
    assert isinstance(canonical(encoded(Image.new("RGB", (1, 1)), "PNG"), Limits(min_side=1)), CanonicalImage)
    thin = encoded(Image.new("RGB", (2000, 20)), "JPEG")
    assert canonical(thin, Limits(max_side=500)) == Dropped("side below 16 px")


def test_gigantic_images_are_dropped_by_their_header() -> None:
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = png_file((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    assert canonical(bomb) == Dropped("too many pixels")
    header = struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0)  # allowed, so the pixels are looked for
    assert canonical(png_file((b"IHDR", header), (b"IEND", b""))) == Dropped("damaged")
    assert canonical(encoded(Image.new("RGB", (100, 100)), "PNG"), Limits(max_pixels=9999)) == Dropped(
        "too many pixels"
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_max_side_stores_smaller(kind: str) -> None:
    large = picture(900, 1500)
    result, pixels = accepted(encoded(Image.fromarray(large), kind), Limits(max_side=300))
    assert (result.height, result.width, result.converted) == (180, 300, ("downscaled",))
    expected = np.asarray(Image.fromarray(large).resize((300, 180), Image.Resampling.LANCZOS))
    assert np.abs(pixels.astype(int) - expected).mean() < 3
    data = encoded(Image.fromarray(large), kind)
    assert accepted(data, Limits(max_side=1500))[0].data == data


def test_png_round_trip() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 17, 3), np.uint8)
    for level in (0, 1, 3, 9):
        assert (decode(encode_png(pixels, level)) == pixels).all()


@pytest.mark.parametrize(
    ("options", "value"),
    [({"min_side": 0}, "0"), ({"max_side": 8}, "8"), ({"max_pixels": 10**9}, "1000000000")],
)
def test_limits_name_the_wrong_value(options: dict[str, int], value: str) -> None:
    with pytest.raises(ValueError, match=value):
        Limits(**options)
