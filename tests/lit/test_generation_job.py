"""Jobs of many lines: what comes out, how it goes on, and that a bad line harms no other."""

import io
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_diffusion_decoder_module import write_tokenizer
from tiny_mllm import build_mllm
from tiny_run import write_run

import cli
from callbacks import PredictionAnswers
from illume_lightning.data.schedule import Phase
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.shapes_conversations import prepare_shapes_tokenizer
from illume_lightning.lit.answers import METADATA, AnswerFolder
from illume_lightning.lit.conversation_data import ConversationDataModule
from illume_lightning.lit.generation_job import Model, run_job
from illume_lightning.lit.illume import Illume
from illume_lightning.lit.job_lines import prompt_lines, read_jobs
from illume_lightning.lit.mllm import MLLMStage2
from illume_lightning.lit.worker import Drawing, Settings, Worker
from illume_lightning.resolution import Size

SIDE = 32
PHASE = {"until_step": 1, "mode": "fixed", "side": SIDE, "batch_size": 1, "micro_batch_size": 1}
SHORT = Settings(max_tokens=8)
QUICK = ("--device=cpu", "--slots=4", "--context=512", "--max_tokens=8")


def write_mllm(folder: Path, world: Path) -> None:
    """An MLLM run that names no tokenizer."""
    vocabulary = TextTokenizer(world / "text_tokenizer").vocabulary(64, 96, size_step=16)
    torch.manual_seed(0)
    mllm = build_mllm(vocabulary=vocabulary, slot_grid=4)
    init_args = {"vocabulary": asdict(vocabulary), "slot_grid": 4}
    section = {"class_path": "tiny_mllm.build_mllm", "init_args": init_args}
    model = {"class_path": "illume_lightning.lit.mllm.MLLMStage2", "init_args": {"mllm": section}}
    data = {"init_args": {"text_tokenizer": str(world / "text_tokenizer")}}
    write_run(folder, mllm, {"model": model, "data": data, "curriculum": {"phases": [PHASE]}})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text tokenizer, DualViTok run, MLLM run, and pictures."""
    folder = tmp_path_factory.mktemp("world")
    prepare_shapes_tokenizer(folder / "text_tokenizer")
    write_tokenizer(folder / "dualvitok")
    write_mllm(folder / "run", folder)
    (folder / "images").mkdir()
    for number, size in enumerate(((40, 32), (32, 64))):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    (folder / "images" / "broken.png").write_bytes(b"\x89PNG nothing more")
    return folder


def model(world: Path, **options: Any) -> Model:
    given = {"tokenizer": str(world / "dualvitok"), "device": "cpu", "slots": 4, "context": 512}
    return Model(str(world / "run"), **(given | options))


@pytest.fixture(scope="module")
def illume(world: Path) -> Illume:
    return model(world).load()


GOOD: list[dict[str, Any]] = [
    {"prompt": "a red circle"},
    {"id": "wide", "prompt": "a wide\nblue square", "size": [32, 64], "seed": 7},
    {"image": "images/0.png", "instruction": "make it green", "id": "edit"},
    {"image": "images/0.png", "question": "What is it?"},
    {"image": ["images/0.png", "images/1.png"], "question": "<image>\nWhat differs from <image>?"},
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            {
                "role": "user",
                "content": [{"type": "image", "image": "images/1.png"}, {"type": "text", "text": "?"}],
            },
        ]
    },
    {"question": "How many?"},
]


def write_jobs(world: Path, lines: list[Any], name: str = "jobs.jsonl") -> Path:
    path = world / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answer(illume: Illume, jobs: Path, output: Path, settings: Settings = SHORT) -> int:
    """The whole job in this process, with a model that is loaded already."""
    lines, images = read_jobs(str(jobs))
    folder = AnswerFolder(output)
    worker = Worker(illume, settings, images)
    folder.write(worker.work(worker.unfinished(lines, folder.finished())), "all", lines)
    return sum("error" in (record or {}) for record in folder.finish(lines))


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]


def content(output: Path) -> dict[str, Any]:
    """What must not depend on how the job was run."""
    kept = {
        record["id"]: {key: record[key] for key in ("task", "text", "pictures", "settings")}
        for record in records(output)
    }
    pictures = {path.name: np.array(Image.open(path)).tobytes() for path in (output / "pictures").iterdir()}
    return {"records": kept, "pictures": pictures}


# -- what comes out --


@pytest.fixture(scope="module")
def done(illume: Illume, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("done") / "out"
    assert answer(illume, write_jobs(world, GOOD), output) == 0
    return output


def test_answers_are_in_the_order_of_the_lines(done, world):
    found = records(done)
    assert [record["id"] for record in found] == [
        "000001",
        "wide",
        "edit",
        *(f"00000{n}" for n in (4, 5, 6, 7)),
    ]
    assert [record["place"] for record in found] == [f"{world}/jobs.jsonl:{n}" for n in range(1, 8)]
    assert all(set(record) - {"text", "pictures"} == set(found[0]) - {"text", "pictures"} for record in found)
    assert found[0]["pictures"] == ["pictures/000001.png"]
    sizes = [Image.open(done / record["pictures"][0]).size[::-1] for record in found[:3]]
    assert sizes == [(SIDE, SIDE), (32, 64), (40, 32)]
    assert all(record["seconds"] > 0 for record in found)
    assert (done / "index.html").is_file()


def test_metadata_make_the_same_picture_again(done, illume):
    with Image.open(done / "pictures/wide.png") as image:
        text, pixels = image.text, np.array(image)
    assert text["prompt"] == "a wide\nblue square"
    record = json.loads(text[METADATA])
    assert record == next(record for record in records(done) if record["id"] == "wide")
    settings = record["settings"]
    assert (settings["seed"], settings["size"], settings["decoder"]) == (7, [32, 64], "dualvitok")
    assert settings["guidance"] == 2.0 and settings["pixel"]["top_k"] == 6144
    height, width = settings["size"]
    again = illume.generate(record["task"]["prompt"], (height, width), [settings["seed"]])[0]
    assert np.array_equal(np.array(again), pixels)


def test_a_seed_follows_from_the_id():
    first, second = prompt_lines(["a", "b"])
    assert Settings().seed_of(first) == 4267791775
    assert Settings().seed_of(first) != Settings().seed_of(second)
    assert Settings(seed=1).seed_of(first) != Settings().seed_of(first)
    assert Settings(seed=1).seed_of(first._replace(task={"seed": 5})) == 5


def test_options_change_sampling_and_leave_the_rest():
    found = Drawing(temperature=0.5, top_k=10, text_top_p=0.9).defaults()
    assert (found.generate.semantic.top_k, found.generate.pixel.top_k) == (10, 30)
    assert found.generate.pixel.temperature == 0.5 and found.generate.text.temperature == 0
    assert found.chat.text.top_p == 0.9 and found.chat.pixel.top_p == 1
    assert (found.generate.guidance, found.edit.guidance) == (2.0, 1.25)
    assert Drawing(guidance=1.0).defaults().edit.guidance == 1.0


# -- going on --


def test_a_job_goes_on_after_a_kill(done, illume, world, tmp_path):
    """Cut off after the third answer, in the middle of its record."""
    jobs = world / "jobs.jsonl"
    lines, images = read_jobs(str(jobs))
    folder = AnswerFolder(tmp_path / "out")
    worker = Worker(illume, SHORT, images)

    def killed():
        for number, one in enumerate(worker.work(lines)):
            if number == 3:
                raise KeyboardInterrupt
            yield one

    with pytest.raises(KeyboardInterrupt):
        folder.write(killed(), "all", lines)
    part = folder.path / "answers/all.jsonl"
    *_, cut = part.read_bytes().splitlines()
    part.write_bytes(part.read_bytes()[:-10])
    (folder.path / f"pictures/{json.loads(cut)['id']}.png.writing").write_bytes(b"half a picture")
    assert len(folder.finished()) == 2
    kept = {name: stamp(folder, name) for record in folder.finished().values() for name in record["pictures"]}
    assert answer(illume, jobs, folder.path) == 0
    assert {name: stamp(folder, name) for name in kept} == kept
    (folder.path / f"pictures/{json.loads(cut)['id']}.png.writing").unlink(missing_ok=True)
    assert content(folder.path) == content(done)


def test_a_lost_picture_is_made_again_and_no_other(illume, world, tmp_path):
    jobs = write_jobs(world, GOOD[:3], "three.jsonl")
    answer(illume, jobs, tmp_path)
    folder, before = AnswerFolder(tmp_path), content(tmp_path)
    stamps = {name: stamp(folder, name) for name in ("pictures/000001.png", "pictures/edit.png")}
    (tmp_path / "pictures/wide.png").unlink()
    answer(illume, jobs, tmp_path)
    assert content(tmp_path) == before
    assert {name: stamp(folder, name) for name in stamps} == stamps


def stamp(folder: AnswerFolder, name: str) -> int:
    return (folder.path / name).stat().st_mtime_ns


@pytest.mark.parametrize(
    ("lines", "settings", "expected"),
    [
        ([{"prompt": "a red circle"}], Settings(seed=1), "seed was .*, is now"),
        ([{"prompt": "a red circle"}], Settings(size=(64, 32)), "size was .32, 32., is now .64, 32."),
        (
            [{"prompt": "a blue circle"}],
            Settings(),
            "'000001' .*task was .*red.* is now .*blue.*another folder",
        ),
    ],
)
def test_other_settings_need_another_folder(illume, world, tmp_path, lines, settings, expected):
    answer(illume, write_jobs(world, [{"prompt": "a red circle"}], "one.jsonl"), tmp_path / "out", Settings())
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=expected):
        answer(illume, write_jobs(world, lines, "one.jsonl"), tmp_path / "out", settings)
    assert content(tmp_path / "out") == before


def test_a_changed_image_or_model_needs_another_folder(illume, world, tmp_path):
    source = tmp_path / "image.png"
    Image.new("RGB", (32, 32), "red").save(source)
    jobs = write_jobs(tmp_path, [{"image": "image.png", "instruction": "more"}])
    answer(illume, jobs, tmp_path / "out", Settings())
    Image.new("RGB", (32, 32), "blue").save(source)
    with pytest.raises(ValueError, match="images was .*image.png.* is now"):
        answer(illume, jobs, tmp_path / "out", Settings())
    Image.new("RGB", (32, 32), "red").save(source)
    other = model(world).load()
    with torch.no_grad():
        other.mllm.trunk.layers[0].mlp.up_proj.weight += 1e-3
    with pytest.raises(ValueError, match="mllm was "):
        answer(other, jobs, tmp_path / "out", Settings())


@pytest.mark.parametrize("path", ["full", "file"])
def test_a_folder_of_other_things_is_left_alone(tmp_path, path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/index.html").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises((ValueError, OSError)):
        AnswerFolder(tmp_path / path)
    assert (tmp_path / "full/index.html").read_text() == "mine"


def test_one_process_writes_a_part(tmp_path):
    lines = prompt_lines(["a"])

    def writing():
        AnswerFolder(tmp_path / "out").write([], "1", lines)
        yield

    with pytest.raises(ValueError, match="another process is writing this share"):
        AnswerFolder(tmp_path / "out").write(writing(), "1", lines)


# -- shards, order, processes --


def test_shards_and_neighbours_change_nothing(done, illume, world, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "load", lambda self, process=0: illume)
    lines, images = read_jobs(str(world / "jobs.jsonl"))
    settings = SHORT
    for number in (2, 3, 1):
        run_job(lines, images, tmp_path / "out", model(world), settings, shard=(number, 3))
    assert content(tmp_path / "out") == content(done)
    assert [record["id"] for record in records(tmp_path / "out")] == [line.id for line in lines]
    run_job(lines[::-1], images, tmp_path / "backwards", model(world), settings)
    assert content(tmp_path / "backwards") == content(done)
    with pytest.raises(ValueError, match="shard 4/3"):
        run_job(lines, images, tmp_path / "out", model(world), settings, shard=(4, 3))


SCRIPT = """\
import sys
sys.path[:0] = {paths!r}
import cli
if __name__ == "__main__":
    cli.main({args!r})
"""


@pytest.mark.slow
def test_several_processes_make_the_same(done, world, tmp_path):
    root = Path(cli.__file__).parent
    args = ["generate", str(world / "run"), str(tmp_path / "out"), f"--jobs={world / 'jobs.jsonl'}"]
    args += [f"--tokenizer={world / 'dualvitok'}", *QUICK, "--processes=2"]
    script = tmp_path / "run.py"

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        script.write_text(SCRIPT.format(paths=[str(root), str(root / "tests")], args=[*args, *more]))
        return subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)

    ended = run()
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert content(tmp_path / "out") == content(done)
    assert len(list((tmp_path / "out/answers").glob("*.jsonl"))) == 2
    ended = run("--seed=9")
    assert ended.returncode == 2
    assert "illume generate: error: the answer" in ended.stderr and "choose another folder" in ended.stderr


# -- bad lines --

ITEM = {"type": "text", "text": "a"}
BAD: list[tuple[Any, str]] = [
    ("{not json", "can't be read: Expecting"),
    ("[1, 2]", "no JSON object"),
    ("[" * 100_000, "can't be read"),
    ('{"prompt": "\\ud800"}', "half a character"),
    ({"prompt": "a", "sed": 1}, "unknown 'sed'.* prompt, seed, size"),
    ({"prompt": "a", "question": "b"}, "prompt and question"),
    ({"text": "a"}, "this one has none"),
    ({"prompt": ""}, "prompt is ''"),
    ({"prompt": " \n"}, "not empty"),
    ({"prompt": 5}, "must be a text"),
    ({"prompt": "an <image>"}, "holds <image>"),
    ({"prompt": "a", "size": [33, 32]}, "33"),
    ({"prompt": "a", "size": [3200, 3200]}, "3200|3,200"),
    ({"prompt": "a", "size": 32}, "give .height, width."),
    ({"prompt": "a", "size": [0, -16]}, "give .height, width."),
    ({"prompt": "a", "seed": "x"}, "whole number"),
    ({"prompt": "a", "seed": -1}, "whole number"),
    ({"prompt": "a " * 900}, "don't fit a context of 512"),
    ({"image": "images/gone.png", "instruction": "a"}, "no image .*gone.png"),
    ({"image": "images", "instruction": "a"}, "no image"),
    ({"image": "images/broken.png", "instruction": "a"}, "broken.png can't be used: (damaged|unreadable)"),
    ({"instruction": "a"}, "'image' is None"),
    ({"image": ["images/0.png"], "instruction": "a"}, "one image"),
    ({"image": "images/0.png", "question": "<image> or <image>?"}, "2 <image> for 1 images"),
    ({"image": ["images/0.png", "images/1.png"], "question": "<image>?"}, "1 <image> for 2 images"),
    ({"question": "<image>?"}, "1 <image> for 0 images"),
    ({"image": 5, "question": "a"}, "list of names"),
    ({"messages": []}, "no list of messages"),
    ({"messages": [5]}, "role and content"),
    ({"messages": [{"role": "user", "content": None}]}, "text or a list"),
    ({"messages": [{"role": "user", "content": "<image>"}]}, "has an <image>"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a message holds"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]}, "name as text"),
    ({"messages": [{"role": "bot", "content": [ITEM]}]}, "role 'bot'"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "nothing to answer",
    ),
    ({"messages": [{"role": "user", "content": ""}]}, "message is empty"),
    ({"id": "../x", "prompt": "a"}, "the id '../x' can't name"),
    ({"id": "/tmp/x", "prompt": "a"}, "can't name"),
    ({"id": "a\\b", "prompt": "a"}, "can't name"),
    ({"id": "..", "prompt": "a"}, "can't name"),
    ({"id": "", "prompt": "a"}, "can't name"),
    ({"id": "x\0", "prompt": "a"}, "can't name"),
    ({"id": "x" * 300, "prompt": "a"}, "can't name"),
    ({"id": ["x"], "prompt": "a"}, "can't name"),
    ({"id": "wide", "prompt": "twice"}, "'wide' stands in .*jobs.jsonl:1 too"),
]


def test_bad_lines_are_told_and_the_rest_goes_on(illume, world, tmp_path, caplog):
    good = {"id": "wide", "prompt": "a circle"}
    last = {"prompt": "the last"}
    jobs = write_jobs(tmp_path, [good, *(line for line, _ in BAD), "", last])
    (tmp_path / "images").symlink_to(world / "images")
    output = tmp_path / "deep" / "out"
    with caplog.at_level("WARNING"):
        assert answer(illume, jobs, output, Settings()) == len(BAD)
    found = records(output)
    assert len(found) == len(BAD) + 2
    assert "error" not in found[0] and "error" not in found[-1]
    for number, ((line, expected), record) in enumerate(zip(BAD, found[1:-1], strict=True), 2):
        assert record["place"] == f"{jobs}:{number}"
        with pytest.raises(ValueError, match=f"(?s){expected}"):
            raise ValueError(record["error"])
        assert f"{jobs}:{number}: {record['error']}" in caplog.messages, line
    number = len(BAD) + 3
    assert found[-1]["id"] == f"{number:06d}", "empty lines count"
    assert {path.name for path in (output / "pictures").iterdir()} == {"wide.png", f"{number:06d}.png"}
    assert {path.name for path in tmp_path.rglob("*.png")} == {"wide.png", f"{number:06d}.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"jobs.jsonl", "images", "deep"}


def test_a_mended_line_is_answered(illume, world, tmp_path):
    jobs = write_jobs(tmp_path, [{"image": "late.png", "instruction": "a"}])
    assert answer(illume, jobs, tmp_path / "out") == 1
    Image.new("RGB", (32, 32)).save(tmp_path / "late.png")
    assert answer(illume, jobs, tmp_path / "out") == 0
    assert "error" not in records(tmp_path / "out")[0]


def test_without_a_tokenizer_there_are_words_only(world, tmp_path):
    silent = Illume.from_run(world / "run", device="cpu", slots=4, context=512)
    assert answer(silent, write_jobs(tmp_path, [{"question": "How many?"}]), tmp_path / "out") == 0
    with pytest.raises(ValueError, match="can't make pictures: .*--tokenizer"):
        answer(silent, write_jobs(tmp_path, [{"prompt": "a"}]), tmp_path / "other")


def test_a_size_that_the_diffusion_decoder_has_not(world, illume, tmp_path):
    """Known before any work, as it would end the whole job."""

    class Sizes:
        sizes: list[Size] = [(64, 64)]
        transposed_sizes = False

    class Decoder:
        model = Sizes()

    both = Illume(
        illume.mllm, illume.text_tokenizer, illume.tokenizer, Decoder(), [(32, 32)], slots=2, context=512
    )
    task = {"prompt": "a", "size": [32, 64]}
    lines, images = read_jobs(str(write_jobs(tmp_path, [task])))
    worker = Worker(both, Settings(), images)
    worker.settings = Settings(decoder="diffusion")
    (found,) = worker.work(lines)
    assert "the diffusion decoder has none of this aspect ratio" in found.record["error"]


# -- the sheet --


def test_the_sheet_escapes_what_people_wrote(illume, tmp_path):
    nasty = '<script>alert("1")</script> & {braces} \'"><img src=x onerror=alert(1)>'
    lines = [
        {"prompt": nasty, "id": "a b#c"},
        {"prompt": nasty, "size": "<b>"},
        {"id": "<i>", "prompt": nasty},
    ]
    assert answer(illume, write_jobs(tmp_path, lines), tmp_path / "out") == 2
    page = (tmp_path / "out/index.html").read_text()
    assert "<script" not in page and "<b>&" not in page and "<img src=x" not in page and "<i>" not in page
    assert page.count("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; {braces}") == 3
    assert 'href="pictures/a%20b%23c.png"' in page
    assert page.count("<img ") == page.count('src="data:image/jpeg;base64,') == 1
    assert "3 answers, 1 pictures, 2 errors" in page


# -- the command --


def generate(world: Path, output: Path, *args: str) -> None:
    cli.main(
        ["generate", str(world / "run"), str(output), *args, f"--tokenizer={world / 'dualvitok'}", *QUICK]
    )


def test_the_command_takes_prompts(world, tmp_path, capsys):
    generate(world, tmp_path / "out", "a red circle", "[1, 2] {x}", "--size=32x64", "--top_k=9", "--seed=3")
    found = records(tmp_path / "out")
    assert [record["task"]["prompt"] for record in found] == ["a red circle", "[1, 2] {x}"]
    assert [record["place"] for record in found] == ["prompt:1", "prompt:2"]
    assert found[0]["settings"]["size"] == [32, 64]
    assert found[0]["settings"]["semantic"]["top_k"] == 9 and found[0]["settings"]["pixel"]["top_k"] == 27
    assert len(list((tmp_path / "out/pictures").iterdir())) == 2


def test_the_command_reads_standard_input(done, world, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((world / "jobs.jsonl").read_bytes())))
    generate(world, tmp_path / "out", "--jobs", "-")
    assert content(tmp_path / "out") == content(done)


def test_the_command_ends_with_1_if_lines_failed(world, tmp_path, capsys):
    jobs = write_jobs(tmp_path, [{"prompt": "a"}, {"prompt": ""}])
    with pytest.raises(SystemExit) as stop:
        generate(world, tmp_path / "out", f"--jobs={jobs}")
    assert stop.value.code == 1
    assert len(records(tmp_path / "out")) == 2


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "give prompts after OUT, or --jobs"),
        (["a", "--jobs=-"], "one of the two"),
        (["--jobs=gone.jsonl"], "no file gone.jsonl"),
        (["a", "--size=32,32"], "HEIGHTxWIDTH"),
        (["a", "--shard=2"], "shard is '2'"),
        (["a", "--shard=2/1"], "shard 2/1"),
        (["a", "--temperature=-1"], "temperature is -1"),
        (["a", "--decoder=diffusion"], "no diffusion decoder"),
    ],
)
def test_wrong_options_end_in_one_line(args, expected, world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        generate(world, tmp_path / "out", *args)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]


# -- Lightning --


def predict(world: Path, folder: Path, jobs: Path | None) -> None:
    from test_diffusion_decoder_module import trainer_for

    torch.manual_seed(1)
    vocabulary = TextTokenizer(world / "text_tokenizer").vocabulary(64, 96, size_step=16)
    mllm = build_mllm(vocabulary=vocabulary, slot_grid=4)
    data = ConversationDataModule(
        str(world / "text_tokenizer"), vocabulary, predict=None if jobs is None else str(jobs)
    )
    trainer = trainer_for(folder, [Phase(**PHASE)], PredictionAnswers())
    trainer.predict(
        MLLMStage2(mllm, tokenizer=str(world / "dualvitok")),
        data,
        return_predictions=False,
        ckpt_path=world / "run/checkpoints/last.ckpt",
    )


def test_predict_through_lightning_does_the_same(world, tmp_path):
    illume = model(world, context=1024).load()
    jobs = write_jobs(world, GOOD[:4], "predict.jsonl")
    answer(illume, jobs, tmp_path / "out", Settings())
    predict(world, tmp_path, jobs)
    assert content(tmp_path / "predictions") == content(tmp_path / "out")
    stamp = (tmp_path / "predictions/pictures/wide.png").stat().st_mtime_ns
    write_jobs(world, [*GOOD[:4], {"prompt": ""}], "predict.jsonl")
    with pytest.raises(SystemExit) as stop:
        predict(world, tmp_path, jobs)
    assert stop.value.code == 1
    assert len(records(tmp_path / "predictions")) == 5
    assert (tmp_path / "predictions/pictures/wide.png").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"set data.predict"):
        predict(world, tmp_path, None)
