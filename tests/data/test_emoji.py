"""Emoji: names and pictures are joined by code point; what looks alike stays together."""

import io
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from illume_lightning.data.image import decode
from illume_lightning.data.store import ImageStore
from illume_lightning.data.worlds import emoji
from illume_lightning.data.worlds.emoji import base_label, composite, fetch_emoji, list_emoji, prepare_emoji

TONES = ["light", "medium", "dark"]


@pytest.fixture
def package_dir(tmp_path: Path) -> Path:
    """The packages' layout with 20 things, three runners with skin tones, a flag, a nameless picture."""
    entries = [
        {"label": f"thing {n}", "hexcode": f"1F{n:03X}-FE0F", "tags": ["t"], "group": 4} for n in range(20)
    ]
    for number, who in enumerate(("person", "man", "woman")):
        skins = [
            {
                "label": f"{who} running: {tone} skin tone",
                "hexcode": f"1F3C3-1F3F{t}-200D-264{number}",
                "tone": t,
            }
            for t, tone in enumerate(TONES, 1)
        ]
        label = f"{who} running"
        entries.append(
            {"label": label, "hexcode": f"1F3C3-200D-264{number}", "tags": [], "group": 1, "skins": skins}
        )
    entries.append({"label": "flag: France", "hexcode": "1F1EB-1F1F7", "tags": [], "group": 9})
    names = tmp_path / "node_modules" / "emojibase-data" / "en"
    names.mkdir(parents=True)
    (names / "data.json").write_text(json.dumps(entries))
    assets = tmp_path / "node_modules" / "@lobehub" / "fluent-emoji-3d" / "assets"
    assets.mkdir(parents=True)
    codes = [variant["hexcode"].lower() for entry in entries for variant in (entry, *entry.get("skins", ()))]
    for code in [*codes, "ffff"]:
        (assets / f"{code}.webp").write_bytes(picture())
    return tmp_path


def picture() -> bytes:
    """Red on the left, half transparent in the middle, nothing on the right."""
    pixels = np.zeros((32, 48, 4), np.uint8)
    pixels[:, :16] = (200, 0, 0, 255)
    pixels[:, 16:32] = (200, 0, 0, 128)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def test_join(package_dir: Path) -> None:
    emojis = list_emoji(package_dir)
    assert len(emojis) == 20 + 3 * 4
    assert [e.code for e in emojis] == sorted(e.code for e in emojis)
    runners = [e for e in emojis if "running" in e.label]
    assert {e.base for e in runners} == {"running"}
    assert {e.tone for e in runners} == {(), (1,), (2,), (3,)}
    assert not any("flag" in e.label for e in emojis)


@pytest.mark.parametrize(
    ("label", "base"),
    [
        ("woman running: facing right", "running"),
        ("men with bunny ears", "with bunny ears"),
        ("kiss: woman, man", "kiss"),
        ("woman", "person"),
        ("grinning face", "grinning face"),
        ("mango", "mango"),
    ],
)
def test_base_label(label: str, base: str) -> None:
    assert base_label(label) == base


def test_composite() -> None:
    pixels = composite(picture(), (0, 100, 50))
    assert pixels[0, 0].tolist() == [200, 0, 0]
    assert pixels[0, 47].tolist() == [0, 100, 50]
    assert np.abs(pixels[0, 20].astype(int) - [100, 50, 25]).max() <= 1


def test_prepare(package_dir: Path, tmp_path: Path) -> None:
    manifests = prepare_emoji(tmp_path / "out", package_dir, holdout=0.3, fetch=False)
    records = {}
    for split in manifests:
        store = ImageStore(tmp_path / "out" / split)
        records[split] = [store.read(index) for index in range(len(store))]
    assert sum(map(len, records.values())) == 32
    assert min(map(len, records.values())) >= 2
    bases = {split: {json.loads(record.meta)["base"] for record in kept} for split, kept in records.items()}
    assert not bases["train"] & bases["val"]
    backgrounds: dict[str, set[tuple[int, ...]]] = {}
    for record in records["train"] + records["val"]:
        meta = json.loads(record.meta)
        assert record.caption == meta["label"]
        backgrounds.setdefault(meta["base"], set()).add(tuple(decode(record.image)[0, 47].tolist()))
    assert all(len(colours) == 1 for colours in backgrounds.values())
    assert len(set.union(*backgrounds.values())) == len(backgrounds) == 21  # another colour for each base
    prepare_emoji(tmp_path / "other", package_dir, holdout=0.3, seed=1, fetch=False)
    other = ImageStore(tmp_path / "other" / "train")
    assert other.read(0).caption == records["train"][0].caption
    assert other.read(0).image != records["train"][0].image


def test_missing_packages_and_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match="npm install --ignore-scripts --prefix .*fluent-emoji-3d@1.1.0"
    ):
        prepare_emoji(tmp_path / "out", tmp_path / "none", fetch=False)
    with pytest.raises(ValueError, match="holdout is 0"):
        prepare_emoji(tmp_path / "out", tmp_path / "none", holdout=0, fetch=False)
    monkeypatch.setattr(emoji.shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="npm is not installed"):
        prepare_emoji(tmp_path / "out", tmp_path / "none")


def test_fetch_runs_npm_without_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "no network")

    monkeypatch.setattr(emoji.shutil, "which", lambda _: "npm")
    monkeypatch.setattr(emoji.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"npm failed \(1\): no network"):
        fetch_emoji(tmp_path / "packages")
    assert "--ignore-scripts" in commands[0]
    assert commands[0][-2:] == list(emoji.PACKAGES)
