"""Emoji: 3D pictures with names, real image-text pairs that fit on any disk.

Pictures are Microsoft's Fluent Emoji (npm package `@lobehub/fluent-emoji-3d`), names and tags are from
`emojibase-data`; both are under the MIT licence. `fetch_emoji` gets them:

    npm install --ignore-scripts --prefix DIR @lobehub/fluent-emoji-3d@1.1.0 emojibase-data@17.0.0
"""

import hashlib
import io
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from illume_lightning.data.image import encode_png
from illume_lightning.data.part import Lost, Sample
from illume_lightning.data.store import Manifest
from illume_lightning.data.writer import write_stores

log = logging.getLogger(__name__)

PACKAGES = ("@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0")
NAMES = "node_modules/emojibase-data/en/data.json"
"""Names, tags and groups, below the folder of the packages."""

PERSONS = frozenset(["man", "men", "woman", "women", "person", "people", "and"])
"""Words of a name that say who it is."""

_PICTURES = "node_modules/@lobehub/fluent-emoji-3d/assets"
_FLAGS = 9  # emojibase's number of the group; their pictures are not Microsoft's
_PART_ITEMS = 512


@dataclass(frozen=True)
class Emoji:
    """One emoji.

    Args:
        code: Its code points as in file names, lower-case hexadecimal, joined by "-", without "fe0f".
        label: Its name, for example "woman running: dark skin tone".
        base: The name without skin tone and gender: emoji with the same base look alike.
        tags: Words for it.
        tone: Skin tones, 1 (light) to 5 (dark), one for each person; empty if neutral.
    """

    code: str
    label: str
    base: str
    tags: tuple[str, ...]
    tone: tuple[int, ...]


def fetch_emoji(package_dir: str | Path) -> None:
    """Install the npm packages, without running any of their scripts.

    Args:
        package_dir: Folder for `node_modules`; about 75 MB.

    Raises:
        FileNotFoundError: If npm is not installed.
        RuntimeError: If npm fails; the message has its last words.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            "npm is not installed; install Node.js, or copy a folder that was fetched on another machine"
        )
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(package_dir)]
    command = [npm, "install", *flags, *PACKAGES]
    log.info("running %s", " ".join(command))
    Path(package_dir).mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"npm failed ({done.returncode}): {done.stderr.strip()[-500:]}")


def prepare_emoji(
    output: str | Path,
    package_dir: str | Path,
    *,
    holdout: float = 0.1,
    seed: int = 0,
    fetch: bool = True,
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Write emoji of 256 x 256 pixels with their names as captions to `<output>/train` and `<output>/val`.

    Emoji that look alike (skin tones, genders) are in the same split and on the same background, a random
    plain colour. `meta` of each record has the fields of `Emoji`. Flags are left out.

    Args:
        output: The folder to make.
        package_dir: Where the npm packages are, or are to be put.
        holdout: Share of the base names that goes to "val", above 0 and below 1.
        seed: Another seed gives other backgrounds; the splits stay.
        fetch: Fetch the packages if they are not in `package_dir`.
        num_workers: Processes; 0 works in this one. The result does not depend on it.
        overwrite: Replace stores that were made with other options.

    Returns:
        The manifests, by split.

    Raises:
        FileNotFoundError: If the packages are missing and not to be fetched, or npm is missing.
        RuntimeError: If npm fails.
        ValueError: If `holdout` is out of range, or `output` holds something else.
    """
    check_holdout(holdout)
    root = Path(package_dir)
    if fetch and not ((root / NAMES).is_file() and (root / _PICTURES).is_dir()):
        fetch_emoji(root)
    emojis = list_emoji(root)
    return write_stores(
        output,
        {"kind": "emoji", "packages": PACKAGES, "holdout": holdout, "seed": seed},
        lambda: [
            EmojiPart(tuple(emojis[start : start + _PART_ITEMS]), root, holdout, seed)
            for start in range(0, len(emojis), _PART_ITEMS)
        ],
        splits=("train", "val"),
        num_workers=num_workers,
        overwrite=overwrite,
    )


def check_holdout(holdout: float) -> None:
    """Refuse a share that leaves one of the splits empty.

    Raises:
        ValueError: if it is out of range.
    """
    if not 0 < holdout < 1:
        raise ValueError(f"holdout is {holdout}; it is a share, above 0 and below 1")


def list_emoji(package_dir: str | Path) -> list[Emoji]:
    """All emoji that have a picture and a name, without flags, by code.

    Args:
        package_dir: Folder with `node_modules`, see `fetch_emoji`.

    Raises:
        FileNotFoundError: If the packages are not there.
    """
    root = Path(package_dir)
    if not ((root / NAMES).is_file() and (root / _PICTURES).is_dir()):
        raise FileNotFoundError(
            f"{root} has no {NAMES} or no {_PICTURES}; fetch them: "
            f"npm install --ignore-scripts --prefix {root} {' '.join(PACKAGES)}"
        )
    pictures = picture_paths(root)
    found = []
    for entry in json.loads((root / NAMES).read_text()):
        if entry.get("group") == _FLAGS:
            continue
        for variant in (entry, *entry.get("skins", ())):
            code = normal_code(variant["hexcode"])
            if code in pictures:
                tone = variant.get("tone", ())
                tones = (tone,) if isinstance(tone, int) else tuple(tone)
                tags = tuple(entry.get("tags", ()))
                found.append(Emoji(code, variant["label"], base_label(entry["label"]), tags, tones))
    return sorted(found, key=lambda emoji: emoji.code)


def picture_paths(package_dir: str | Path) -> dict[str, Path]:
    """The pictures' files by code."""
    return {normal_code(path.stem): path for path in (Path(package_dir) / _PICTURES).glob("*.webp")}


def split_of(emoji: Emoji, holdout: float) -> str:
    """The split of an emoji, "train" or "val": one for all with the same base name.

    Args:
        emoji: Any.
        holdout: Share of the base names that goes to "val".
    """
    return "val" if stable_hash(emoji.base) < holdout * 2**64 else "train"


def base_label(label: str) -> str:
    """A name without gender and direction: "woman running: facing right" becomes "running"."""
    words = re.split(r"[\s,:]+", label.lower().replace("facing right", ""))
    return " ".join(word for word in words if word and word not in PERSONS) or "person"


@dataclass(frozen=True)
class EmojiPart:
    """Some of the emoji."""

    emojis: tuple[Emoji, ...]
    package_dir: Path
    holdout: float
    seed: int

    @property
    def num_items(self) -> int:
        """Number of emoji."""
        return len(self.emojis)

    def read(self) -> Iterator[Sample | Lost]:
        """Put each emoji on its background."""
        paths = picture_paths(self.package_dir)
        for emoji in self.emojis:
            split = split_of(emoji, self.holdout)
            pixels = composite(paths[emoji.code].read_bytes(), self.background(emoji))
            height, width, _ = pixels.shape
            meta = json.dumps(asdict(emoji))
            yield Sample(emoji.code, encode_png(pixels), emoji.label, meta, height, width, (), split)

    def background(self, emoji: Emoji) -> tuple[int, int, int]:
        """The colour behind an emoji, RGB, 0 to 255.

        One for all that look alike, so that two of them differ in what their names say and in nothing else.
        """
        key = np.array([self.seed, stable_hash(emoji.base)], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key))
        red, green, blue = random.integers(0, 256, 3).tolist()
        return red, green, blue


def composite(data: bytes, background: tuple[int, int, int]) -> np.ndarray:
    """Put a transparent picture on a plain colour.

    Args:
        data: Encoded picture with transparency.
        background: RGB, 0 to 255.

    Returns:
        RGB, uint8 (H, W, 3).
    """
    with Image.open(io.BytesIO(data), formats=("WEBP", "PNG")) as image:
        layer = image.convert("RGBA")
    canvas = Image.new("RGBA", layer.size, background)
    return np.asarray(Image.alpha_composite(canvas, layer).convert("RGB"))


def normal_code(text: str) -> str:
    """Code points in the form that both packages share."""
    return text.lower().replace("-fe0f", "")


def stable_hash(text: str) -> int:
    """A number from 0 to 2^64 - 1, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
