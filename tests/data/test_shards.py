"""Shards: any preparation by several jobs, in any order and killed anywhere, is what one job makes."""

import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_run import write_dualvitok_run

import cli
from illume_lightning.data.prepare import prepare_images
from illume_lightning.data.prepare_conversations import prepare_conversations
from illume_lightning.data.shard import Shard, divided
from illume_lightning.data.store import ImageStore
from illume_lightning.data.text_tokenizer import train_tokenizer
from illume_lightning.data.worlds import prepare_shapes, shapes_conversations
from illume_lightning.data.writer import merge_shards
from illume_lightning.lit.prepare_latents import prepare_latents
from illume_lightning.lit.prepare_tokens import prepare_tokens

Prepare = Callable[[Path], object]
COUNT = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, one of them broken, conversations about them, stores and tokenizers."""
    root = tmp_path_factory.mktemp("source")
    (root / "pictures").mkdir()
    records = []
    for number in range(17):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 3, 24, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        (root / "pictures" / f"{number:02d}.jpg").write_bytes(
            buffer.getvalue()[: 200 if number == 9 else None]
        )
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Picture {number}"}]
        records.append({"image": f"{number:02d}.jpg", "conversations": turns})
    (root / "talks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    train_tokenizer(["What? Picture"], root / "text", 270)
    write_dualvitok_run(root / "dualvitok")
    prepare_shapes.prepare_shapes(root / "shapes", count=14, sizes=((64, 64), (64, 128)))
    shapes_conversations.prepare_shapes_conversations(
        root / "generation",
        tokenizer=str(root / "text"),
        task="generation",
        count=14,
        sizes=((32, 32), (32, 64)),
    )
    return root


def preparations(source: Path) -> dict[str, Prepare]:
    """What is prepared, all in several parts."""
    tokenizer = str(source / "dualvitok")
    return {
        "images": lambda out: prepare_images([str(source / "pictures")], out, part_items=3, holdout=0.3),
        "conversations": lambda out: prepare_conversations(
            [str(source / "talks.jsonl")], out, tokenizer=str(source / "text"), part_items=3,
            image_root=str(source / "pictures"),
        ),
        "shapes": lambda out: prepare_shapes.prepare_shapes(out, count=14, sizes=((32, 48),)),
        "tokens": lambda out: prepare_tokens(str(source / "generation"), out, tokenizer, side=32, part_items=4),
        "latents": lambda out: prepare_latents(
            str(source / "shapes"), out, tokenizer, space_to_depth=4, side=64, part_items=4
        ),
    }  # fmt: skip


KINDS = ("images", "conversations", "shapes", "tokens", "latents")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_shapes, "_PART_ITEMS", 3)


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def write_shard(prepare: Prepare, out: Path, index: int, count: int = COUNT) -> None:
    with divided(Shard(index, count)):
        assert prepare(out) == {}


def in_a_process(work: Callable[[], object]) -> int:
    """The id of a forked process that ends with status 0 if `work` does not fail, without any clean-up."""
    child = os.fork()
    if not child:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_merged_shards_are_the_store_of_one_job(kind: str, source: Path, tmp_path: Path) -> None:
    prepare = preparations(source)[kind]
    whole = prepare(tmp_path / "whole")
    out = tmp_path / "out"
    for index in (2, 0, 1):
        assert not out.exists()
        write_shard(prepare, out, index)
    assert merge_shards(out) == whole
    assert content(out) == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]
    assert prepare(out) == whole  # complete already
    with divided(Shard(1, COUNT)):
        assert prepare(out) == whole
    assert merge_shards(out) == {}
    assert sorted(os.listdir(tmp_path)) == ["out", "whole"]


def test_shards_that_run_at_once(source: Path, tmp_path: Path) -> None:
    prepare, out = preparations(source)["images"], tmp_path / "out"
    prepare(tmp_path / "whole")
    children = [in_a_process(lambda index=index: write_shard(prepare, out, index, 5)) for index in range(5)]
    assert [status(child) for child in children] == [0] * 5
    merge_shards(out)
    assert content(out) == content(tmp_path / "whole")


def test_shards_killed_at_every_rename_and_started_again(source: Path, tmp_path: Path) -> None:
    prepare, out = preparations(source)["images"], tmp_path / "out"
    prepare(tmp_path / "whole")
    replace = os.replace

    def die_at(count: int) -> None:
        def count_down(old: Path, new: Path) -> None:
            nonlocal count
            if not count:
                os._exit(9)
            count -= 1
            replace(old, new)

        os.replace = count_down
        write_shard(prepare, out, 1)

    num_kills = 0
    while status(in_a_process(partial(die_at, num_kills))) == 9:
        with pytest.raises(ValueError, match=r"lacks what these shards write: .*1/3|was not begun by shards"):
            merge_shards(out)
        for index in (0, 1, 2) if num_kills % 2 else (2, 1, 0):
            write_shard(prepare, out, index)
        merge_shards(out)
        assert content(out) == content(tmp_path / "whole")
        shutil.rmtree(out)
        num_kills += 1
    assert num_kills > 5


def test_a_merge_that_was_killed_is_given_again(source: Path, tmp_path: Path) -> None:
    prepare, out = preparations(source)["shapes"], tmp_path / "out"
    prepare(tmp_path / "whole")
    replace = os.replace

    def die(before: int) -> None:
        def count_down(old: Path, new: Path) -> None:
            if Path(new) == out:
                if not before:
                    os._exit(9)
                replace(old, new)
                os._exit(9)
            replace(old, new)

        os.replace = count_down
        merge_shards(out)

    for before in (0, 1):
        for index in range(COUNT):
            write_shard(prepare, out, index)
        assert status(in_a_process(lambda before=before: die(before))) == 9
        merge_shards(out)
        assert content(out) == content(tmp_path / "whole")
        shutil.rmtree(out)


def test_more_shards_than_parts(source: Path, tmp_path: Path) -> None:
    prepare, out = preparations(source)["shapes"], tmp_path / "out"
    for index in range(8):
        write_shard(prepare, out, index, 8)
    prepare(tmp_path / "whole")
    merge_shards(out)
    assert content(out) == content(tmp_path / "whole")


def test_without_shard_the_same_command_does_what_is_left(source: Path, tmp_path: Path) -> None:
    prepare, out = preparations(source)["images"], tmp_path / "out"
    whole = prepare(tmp_path / "whole")
    write_shard(prepare, out, 1)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").rglob("*.bin")}
    assert before
    assert prepare(out) == whole
    assert content(out) == content(tmp_path / "whole")
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in out.rglob("*.bin")}.items()


def test_merge_names_missing_shards(source: Path, tmp_path: Path) -> None:
    prepare, out = preparations(source)["images"], tmp_path / "out"
    with pytest.raises(FileNotFoundError, match=r"no shards of .*out; write them with .*--shard 0/8"):
        merge_shards(out)
    write_shard(prepare, out, 1, 4)
    with pytest.raises(
        ValueError, match=r"shards write: 0/4 \(2 parts\), 2/4 \(1 parts\), 3/4 \(1 parts\); run"
    ):
        merge_shards(out)
    for index in (0, 3):
        write_shard(prepare, out, index, 4)
    with pytest.raises(ValueError, match=r"shards write: 2/4 \(1 parts\); run them"):
        merge_shards(out)
    assert not out.exists()


def test_shards_of_other_options_are_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def prepare(min_side: int, index: int = 0, count: int = COUNT, overwrite: bool = False) -> None:
        with divided(Shard(index, count)):
            prepare_images(
                [str(source / "pictures")], out, part_items=3, min_side=min_side, overwrite=overwrite
            )

    prepare(16)
    with pytest.raises(ValueError, match="min_side was 16, is now 21"):
        prepare(21, 1)
    with pytest.raises(ValueError, match="number of shards was 3, is now 4"):
        prepare(16, 1, 4)
    prepare(21, 1, overwrite=True)  # all of the first one goes
    with pytest.raises(ValueError, match="0/3"):
        merge_shards(out)
    with pytest.raises(ValueError, match="min_side was 21, is now 16"):
        prepare(16, 0)
    for index in (0, 2):
        prepare(21, index, overwrite=True)  # the options are the same now
    merge_shards(out)
    prepare_images([str(source / "pictures")], tmp_path / "whole", part_items=3, min_side=21)
    assert content(out) == content(tmp_path / "whole")


def test_shards_of_other_versions_are_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, out = preparations(source)["images"], tmp_path / "out"
    write_shard(prepare, out, 0)
    monkeypatch.setattr("illume_lightning.data.writer.version", lambda name: "99")
    with pytest.raises(ValueError, match=r"litdata was .*, is now 99"):
        write_shard(prepare, out, 1)


def test_a_replaced_store_needs_the_word(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_images([str(source / "pictures")], out, part_items=3)
    for index in range(2):
        with divided(Shard(index, 2)):
            prepare_images([str(source / "pictures")], out, part_items=3, min_side=21, overwrite=True)
    with pytest.raises(ValueError, match=r"min_side was 16, is now 21"):
        merge_shards(out)
    merge_shards(out, overwrite=True)
    assert ImageStore(out).manifest.identity["min_side"] == 21


def test_jobs_in_each_others_way_are_refused(source: Path, tmp_path: Path) -> None:
    prepare, out = preparations(source)["images"], tmp_path / "out"
    for index in range(COUNT):
        write_shard(prepare, out, index)
    parts = tmp_path / "out.partial" / "parts"
    with (parts / "shard-1.lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another process is writing shard 1/3 of"):
            write_shard(prepare, out, 1)
        write_shard(prepare, out, 0)
    with (parts / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # as a shard does
        for work in (lambda: prepare(out), lambda: merge_shards(out)):
            with pytest.raises(RuntimeError, match="another process is writing"):
                work()
        for path in parts.glob("[0-9]*.json"):
            path.unlink()
        with pytest.raises(RuntimeError, match=r"other shards are at work .*holdout was 0.3, is now 0.0"):
            write_shard(lambda out: prepare_images([str(source / "pictures")], out, part_items=3), out, 0)


def test_several_stores_are_merged_together_or_not_at_all(source: Path, tmp_path: Path) -> None:
    kinds = preparations(source)
    stores = {"one": kinds["images"], "two/deep": kinds["shapes"]}
    for name, prepare in stores.items():
        prepare(tmp_path / "whole" / name)
        for index in range(COUNT):
            if (name, index) != ("two/deep", 2):
                write_shard(prepare, tmp_path / "out" / name, index)
    with pytest.raises(ValueError, match=r"deep.partial lacks .*2/3"):
        merge_shards(tmp_path / "out")
    assert not (tmp_path / "out" / "one").exists()
    write_shard(kinds["shapes"], tmp_path / "out" / "two" / "deep", 2)
    assert set(merge_shards(tmp_path / "out")) == {"one/train", "one/val", "two/deep"}
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures, out = str(source / "pictures"), str(tmp_path / "out")

    def error(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main(["prepare", *args])
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    for value in ("8/8", "0/0", "-1/8", "1", "1/2/3", "a/b", ""):
        line = error("images", pictures, out, f"--shard={value}")
        assert line.startswith("illume prepare: error: shard ") and "0/8" in line
    assert "expected one argument" in error("images", pictures, out, "--shard")
    assert "writes no store" in error("shapes-tokenizer", str(tmp_path / "text"), "--shard", "0/2")
    cli.main(["prepare", "images", pictures, str(tmp_path / "whole"), "--part_items", "3"])
    for index in "10":
        cli.main(["prepare", "--shard", f"{index}/2", "images", pictures, out, "--part_items=3"])
        if index == "1":
            assert "0/2 (3 parts)" in error("merge", out)
    cli.main(["prepare", "merge", out])
    assert content(tmp_path / "out") == content(tmp_path / "whole")
