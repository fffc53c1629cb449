import io

import numpy as np
import pytest
from PIL import Image

from illume_lightning.data.transform import decode_at, is_flipped


def encode(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> np.ndarray:
    """A picture whose value tells the place: red grows downwards, green to the right."""
    rows, columns = np.mgrid[0:height, 0:width]
    planes = [rows / height * 255, columns / width * 255, np.full(rows.shape, 128.0)]
    return np.stack(planes, axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("flip", [False, True])
def test_pictures_of_the_size_are_not_touched(flip):
    pixels = noise(48, 32)
    image = decode_at(encode(pixels), (48, 32), flip=flip)
    assert image.dtype == np.uint8
    expected = pixels[:, ::-1] if flip else pixels
    assert np.array_equal(image, expected.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats_decode_as_pillow_does(kind):
    data = encode(smooth(64, 80), kind, quality=90)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_at(data, (64, 80)), expected.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("source", "size"),
    [((90, 60), (32, 32)), ((60, 90), (32, 32)), ((50, 70), (64, 96)), ((31, 97), (16, 48))],
)
def test_cover_and_centre_crop(source, size):
    image = decode_at(encode(smooth(*source)), size).astype(float)
    assert image.shape == (3, *size)
    # Which part of the picture each cell shows, from the geometry alone.
    scale = max(size[0] / source[0], size[1] / source[1])
    for channel, axis in ((0, 0), (1, 1)):
        places = (np.arange(size[axis]) + 0.5 - size[axis] / 2) / scale + source[axis] / 2 - 0.5
        expected = places / source[axis] * 255
        measured = image[channel].mean(axis=1 - axis)
        assert np.abs(measured - expected)[2:-2].max() < 1.5, "the border of the picture is rounded off"


def test_stretch_keeps_everything():
    image = decode_at(encode(smooth(37, 90)), (32, 96), stretch=True)
    assert image[0, 0].mean() < 8
    assert image[0, -1].mean() > 240
    assert image[1, :, 0].mean() < 8
    assert image[1, :, -1].mean() > 240
    cropped = decode_at(encode(smooth(37, 90)), (32, 96))
    assert cropped[0, 0].mean() > 8, "the cover crop loses rows"


def test_flip_mirrors_left_and_right():
    data = encode(smooth(50, 70))
    plain, mirrored = decode_at(data, (32, 32)), decode_at(data, (32, 32), flip=True)
    assert np.array_equal(plain[:, :, ::-1], mirrored)
    assert not np.array_equal(plain, mirrored)


def test_damaged_bytes_raise():
    data = encode(noise(64, 64))
    with pytest.raises(OSError, match="truncated"):
        decode_at(data[: len(data) // 2], (32, 32))


def test_flips_depend_on_seed_and_sample_only():
    flips = [is_flipped(3, number, 0.5) for number in range(2000)]
    assert flips == [is_flipped(3, number, 0.5) for number in range(2000)]
    assert flips != [is_flipped(4, number, 0.5) for number in range(2000)]
    assert abs(sum(flips) - 1000) < 100
    assert not any(is_flipped(3, number, 0.0) for number in range(50))
    assert all(is_flipped(3, number, 1.0) for number in range(50))
    # A higher probability flips the same samples and more.
    assert all(is_flipped(3, number, 0.8) for number in range(2000) if flips[number])
