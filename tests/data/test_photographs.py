"""Photographs come from installed packages, without a network, three of them held out."""

import socket
from pathlib import Path

import pytest

from illume_lightning.data.image import decode
from illume_lightning.data.store import ImageStore
from illume_lightning.data.worlds import photographs
from illume_lightning.data.worlds.photographs import HELD_OUT, PHOTOGRAPHS, prepare_photographs

pytest.importorskip("skimage")
pytest.importorskip("sklearn")


def test_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("photographs need no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    manifests = prepare_photographs(tmp_path / "out")
    assert {split: manifest.written for split, manifest in manifests.items()} == {"train": 8, "val": 3}
    assert all(not manifest.dropped for manifest in manifests.values())
    names = {
        "train": [photograph for photograph in PHOTOGRAPHS if photograph.name not in HELD_OUT],
        "val": [photograph for photograph in PHOTOGRAPHS if photograph.name in HELD_OUT],
    }
    for split, expected in names.items():
        store = ImageStore(tmp_path / "out" / split)
        for index, photograph in enumerate(expected):
            record = store.read(index)
            assert record.caption == photograph.caption
            pixels = decode(record.image)
            assert pixels.shape == (*store.sizes[index], 3)
            assert min(pixels.shape[:2]) >= 300
            assert pixels.std(axis=2).mean() > 1  # in colour
    assert prepare_photographs(tmp_path / "out") == manifests


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-image scikit-learn"):
        prepare_photographs(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
