"""Runs that someone sent: neither a checkpoint nor a configuration of theirs runs anything."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from hostile import Evil
from tiny import build_tiny
from tiny_run import write_dualvitok_run, write_mllm_run, write_run

import cli
from callbacks import WarmStart
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.shapes_conversations import prepare_shapes_tokenizer
from illume_lightning.lit.saved_run import SavedRun
from illume_lightning.lit.tokenizer import check_maker, load_tokenizer
from illume_lightning.nn.checkpoints import load_dualvitok
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.losses import Perceptual

ROOT = Path(__file__).parents[2]
SHAPES = ["-c", str(ROOT / "experiments/shapes/dualvitok.yaml"), "--trainer.accelerator=cpu"]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What hostile code would write."""
    return tmp_path / "mark"


@pytest.fixture
def evil(tmp_path: Path, mark: Path) -> Path:
    """A checkpoint that has everything, and more."""
    state = {f"model.{key}": value for key, value in build_tiny().state_dict().items()}
    content = {"pytorch-lightning_version": "2", "global_step": 3, "state_dict": state}
    torch.save(content | {"callbacks": Evil(exec, f"open({str(mark)!r}, 'w')")}, tmp_path / "evil.ckpt")
    return tmp_path / "evil.ckpt"


def fails(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command ends in."""
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_nothing_that_reads_a_checkpoint_runs_it(evil: Path, mark: Path, tmp_path: Path) -> None:
    write_dualvitok_run(tmp_path / "run")
    evil.rename(evil := tmp_path / "run/checkpoints/last.ckpt")
    module = L.LightningModule()
    module.model = build_tiny()
    warm_start = WarmStart(str(evil), {"": "model."})
    readers = (
        lambda: warm_start.setup(SimpleNamespace(ckpt_path=None), module, "fit"),
        lambda: SavedRun(tmp_path / "run").fill(build_tiny()),
        lambda: load_tokenizer(tmp_path / "run"),
        lambda: load_dualvitok(build_tiny(), evil),
        lambda: check_maker(evil, build_tiny()),
        lambda: Perceptual(backbone_weights=str(evil)),
    )
    for read in readers:
        with pytest.raises(ValueError, match=r"last.ckpt holds more than tensors .* could run code") as error:
            read()
        assert "\n" not in str(error.value)
        assert not mark.exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_no_command_of_training_runs_a_checkpoint(
    command: str, evil: Path, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = [f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.logger=false"]
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    given = fails([command, *SHAPES, *folder, f"--ckpt_path={evil}", "--weights_only=false"], capsys)
    evil.rename(tmp_path / "run/checkpoints/last.ckpt")
    found = fails([command, *SHAPES, *folder, "--weights_only=false"], capsys)
    assert given.startswith(f"illume {command}: error: {evil} holds more than tensors and plain values")
    assert "last.ckpt holds more than tensors" in found
    assert not mark.exists()


def test_no_command_of_use_runs_a_checkpoint(
    evil: Path, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = write_dualvitok_run(tmp_path / "tokenizer")
    prepare_shapes_tokenizer(tmp_path / "text")
    write_mllm_run(tmp_path / "run", TextTokenizer(tmp_path / "text"), tokenizer)
    evil.rename(tmp_path / "run/checkpoints/last.ckpt")
    commands = (
        [
            "generate",
            str(tmp_path / "run"),
            str(tmp_path / "out"),
            "a star",
            "--tokenizer",
            str(tmp_path / "tokenizer"),
        ],
        ["export", str(tmp_path / "run"), str(tmp_path / "exported")],
        ["app", str(tmp_path / "run")],
    )
    for command in commands:
        assert "last.ckpt holds more than tensors" in fails(command, capsys), command
        assert not mark.exists()


def test_a_class_of_a_sent_run_is_refused_in_one_line(
    mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = write_dualvitok_run(tmp_path / "tokenizer")
    prepare_shapes_tokenizer(tmp_path / "text")
    write_mllm_run(tmp_path / "run", TextTokenizer(tmp_path / "text"), tokenizer)
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    evil = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(mark)]}}
    config["model"]["init_args"]["mllm"] = evil
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    for command in (["generate", "RUN", "OUT", "a star"], ["export", "RUN", "OUT"], ["evaluate", "RUN"]):
        names = {"RUN": str(tmp_path / "run"), "OUT": str(tmp_path / command[0])}
        line = fails([names.get(word, word) for word in command], capsys)
        if command[0] != "evaluate":  # which has no data to look at here
            assert "so subprocess.Popen is not imported: remove it" in line
        assert not mark.exists()


def test_weights_are_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ([1, 2], {"state_dict": {}}):
        torch.save(content, tmp_path / "weights.bin")
        words = [
            "fit",
            *SHAPES,
            f"--trainer.default_root_dir={tmp_path}",
            f"--ckpt_path={tmp_path}/weights.bin",
        ]
        assert "is no checkpoint of a run but other weights" in fails(words, capsys)


def test_weights_only_is_not_up_to_the_configuration() -> None:
    class Given:
        config_init: Any = {"fit": {"ckpt_path": None, "weights_only": False}}
        model, datamodule = None, None
        _subcommand_method_arguments: Any = {"fit": ["ckpt_path", "weights_only"]}

    from illume_lightning.lit.cli import IllumeCLI

    kwargs = IllumeCLI._prepare_subcommand_kwargs(object.__new__(type("CLI", (Given, IllumeCLI), {})), "fit")
    assert kwargs["weights_only"] is True


# -- class paths -----------------------------------------------------------------------------------------------


FORBIDDEN = (
    *("os.system", "subprocess.Popen", "builtins.exec", "builtins.eval", "runpy.run_path", "pickle.load"),
    *("shutil.rmtree", "importlib.import_module", "ctypes.CDLL", "functools.partial", "pathlib.Path"),
    *(
        "torch.load",
        "torch.hub.load",
        "torch.utils.cpp_extension.load",
        "torch.jit.load",
        "torch.package.PackageImporter",
    ),
    *("transformers.pipeline", "numpy.load", "yaml.unsafe_load", "PIL.Image.open", "litdata.optimize"),
    *(
        "torch.nn.modules.module.torch.load",
        "torch.optim.optimizer.torch.hub.load",
        "lightning.pytorch.cli.LightningCLI",
    ),
    *("callbacks.warm_start.logging.FileHandler", "illume_lightning.nn.plain_file.pickle.loads"),
    *(
        "illume_lightning.schedule.child.Child",
        "illume_lightning.commands.app",
        "jsonargparse.set_parsing_settings",
    ),
    *("illume_lightning.lit.saved_run.yaml.unsafe_load", "evil_module.Evil", "cli.main"),
)


@pytest.fixture
def evil_module(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that does harm as it is imported."""
    file = tmp_path / "evil_module.py"
    file.write_text(
        f"import tiny\nopen({str(mark)!r}, 'w').close()\n\n"
        "def build() -> tiny.DualViTok:\n    return tiny.build_tiny()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return file


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_run_names_no_class_of_its_liking(name: str, evil_module: Path, mark: Path, tmp_path: Path) -> None:
    before = set(sys.modules)
    for section in (name, {"class_path": name}, {"class_path": name, "init_args": {"args": f"touch {mark}"}}):
        tiny = {"class_path": "tiny.build_tiny", "init_args": {"noise": section}}
        for model in (section, tiny):
            module = {
                "class_path": "illume_lightning.lit.dualvitok.DualViTokModule",
                "init_args": {"model": model},
            }
            folder = write_run(
                tmp_path / f"run{len(list(tmp_path.iterdir()))}", build_tiny(), {"model": module}
            )
            with pytest.raises(Exception, match=r"(not allowed|has no attribute|No module named)"):
                SavedRun(folder).build(DualViTok, "model", "init_args", "model")
            assert not mark.exists()
    assert not {"evil_module", "runpy_", "illume_lightning.schedule.child"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    "words",
    [
        ["--model=os.system"],
        ["--model.init_args.model=torch.hub.load"],
        ["--model.init_args.optimizer=os.system"],
        ["--model.init_args.optimizer={class_path: subprocess.Popen, init_args: {args: [touch, MARK]}}"],
        ["--model.init_args.lr_scheduler={class_path: builtins.exec}"],
        ["--trainer.callbacks+=os.system"],
        [
            "--trainer.callbacks+={class_path: lightning.pytorch.callbacks.LambdaCallback, "
            "init_args: {setup: os.system}}"
        ],
        ["--trainer.logger={class_path: evil_module.Evil}"],
        ["--trainer.plugins=[evil_module.Evil]"],
        ["--data.class_path=evil_module.Evil"],
        ["--optimizer=evil_module.Evil"],
        ["-c", "OVERLAY"],
    ],
)
def test_flags_and_overlays_name_no_class_of_their_liking(
    words: list[str], evil_module: Path, mark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = {"trainer": {"callbacks+": [{"class_path": "evil_module.Evil"}]}}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    words = [
        word.replace("MARK", str(mark)).replace("OVERLAY", str(tmp_path / "overlay.yaml")) for word in words
    ]
    line = fails(["fit", *SHAPES, f"--trainer.default_root_dir={tmp_path}", *words], capsys)
    assert "is not imported: " in line
    assert "evil_module" not in sys.modules and not mark.exists()


def test_users_allow_modules_of_their_own(
    evil_module: Path,
    mark: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["fit", *SHAPES, f"--trainer.default_root_dir={tmp_path}", "--model.model=evil_module.build"]
    assert "if you trust it, allow its package by the environment, ILLUME_ALLOW=evil_module" in fails(
        words, capsys
    )
    assert not mark.exists()
    module = {"init_args": {"model": {"class_path": "evil_module.build"}}}
    folder = write_run(tmp_path / "run", build_tiny(), {"model": module})
    monkeypatch.setenv("ILLUME_ALLOW", "tiny, evil_module")
    assert isinstance(SavedRun(folder).build(DualViTok, "model", "init_args", "model"), DualViTok)
    assert mark.exists()
    for name in ("os", "jsonargparse.typing", "my-package", "a b", "*", "subprocess.Popen"):
        monkeypatch.setenv("ILLUME_ALLOW", name)
        with pytest.raises(ValueError, match="ILLUME_ALLOW holds .* give packages of your own"):
            SavedRun(folder).build(DualViTok, "model", "init_args", "model")


@pytest.mark.parametrize(
    "content",
    [
        "!!python/object/apply:os.system ['touch MARK']",
        "model: !!python/object/new:subprocess.Popen [[touch, MARK]]",
        "model: !!python/name:os.system",
        "[model]",
        "model",
        "",
        "a: [",
        "\x00",
        "[" * 5000,
        "a: &a [*a, *b]",
        "a: &a [*a]",
        "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}, *a{n}, *a{n}]\n" for n in range(40)),
    ],
)
def test_a_configuration_is_plain_yaml(content: str, mark: Path, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", build_tiny(), {})
    (folder / "config.yaml").write_text(content.replace("MARK", str(mark)))
    with pytest.raises(ValueError, match=r"config.yaml (can't be read|is no configuration)") as error:
        SavedRun(folder)
    assert "\n" not in str(error.value)
    assert not mark.exists()


def test_the_environment_stays_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    for reference in (
        "${oc.env:SECRET_TOKEN}",
        "${oc.env:SECRET_TOKEN,nothing}",
        "${oc.decode:${oc.env:SECRET_TOKEN}}",
    ):
        words = [f"--trainer.default_root_dir={tmp_path}/{reference}", "--print_config"]
        with pytest.raises(SystemExit) as stop:
            cli.main(["fit", *SHAPES, *words])
        told = capsys.readouterr()
        assert stop.value.code == 2
        assert "hunter2" not in told.out + told.err
        assert "is not resolved, since environment variables would be saved" in told.err
    assert not list(tmp_path.rglob("config.yaml"))
