"""A schedule's file: `illume` commands in order, checked before anything starts."""

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from illume_lightning.interpolation import forbid_environment

COMMANDS = ("prepare", "fit", "validate", "evaluate", "report", "generate", "export")
SEEDED = ("fit", "validate")
"""Commands of one YAML, whose run's folder is named by the seed."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_KEYS = ("name", "run", "output", "minutes")


@dataclass(frozen=True)
class Step:
    """One command.

    Args:
        name: Unique; also names the step's log.
        command: Words of the command line, without `illume`.
        output: The store, folder or file that it leaves.
        minutes: How long it takes, as measured somewhere; none if nobody has.
    """

    name: str
    command: tuple[str, ...]
    output: str
    minutes: float | None = None

    @property
    def is_fit(self) -> bool:
        """Whether it trains."""
        return self.command[0] == "fit"

    @property
    def configs(self) -> tuple[str, ...]:
        """The YAML files that the command names, in order."""
        files = []
        for word, following in zip(self.command, (*self.command[1:], ""), strict=True):
            if word in ("-c", "--config"):
                files.append(following)
            elif word.startswith(("-c=", "--config=")):
                files.append(word.partition("=")[2])
        return tuple(files)

    def option(self, name: str) -> str | None:
        """What the command gives for an option, `--name VALUE` or `--name=VALUE`; none if it doesn't."""
        value = None
        for word, following in zip(self.command, (*self.command[1:], ""), strict=True):
            if word == name:
                value = following
            elif word.startswith(name + "="):
                value = word.partition("=")[2]
        return value

    def configuration(self) -> dict[str, Any]:
        """What the command's YAML files say together, with its seed, `${}` resolved; flags are left out.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If one can't be read or resolved.
        """
        seed = self.option("--seed_everything")
        files = [read_yaml(file) for file in self.configs]
        if seed is not None:
            files.append(OmegaConf.create({"seed_everything": int(seed)}))
        return _resolved(OmegaConf.merge(*files), ", ".join(self.configs)) if files else {}

    def mentioned(self, paths: Sequence[str]) -> list[str]:
        """Those of the paths that the command or its YAML files name, or of which they name something inside."""
        text = json.dumps([self.command, self.configuration()], ensure_ascii=False)
        return [
            path for path in paths if re.search(rf"(?<![\w./-])(?:\./)?{re.escape(path)}(?![\w.-])", text)
        ]


@dataclass(frozen=True)
class Schedule:
    """A world's steps in order.

    Args:
        world: Names the folder of its runs.
        seed: Of all its fits.
        steps: At least one.
    """

    world: str
    seed: int
    steps: tuple[Step, ...]

    @property
    def folder(self) -> Path:
        """Where the state and the logs are kept."""
        return Path("runs") / self.world / "schedule" / f"seed{self.seed}"

    def part(self, first: str | None, last: str | None) -> range:
        """Numbers of the steps from one to another, both included; the whole without names.

        Raises:
            ValueError: If there is no such step, or they are the wrong way round.
        """
        names = [step.name for step in self.steps]
        for name in (first, last):
            if name is not None and name not in names:
                raise ValueError(f"there is no step {name!r}: the steps are {', '.join(names)}")
        start = names.index(first) if first is not None else 0
        stop = names.index(last) + 1 if last is not None else len(names)
        if start >= stop:
            raise ValueError(f"step {first!r} comes after step {last!r}: nothing is left to do")
        return range(start, stop)


def read_schedule(path: str | Path, seed: int = 0, flags: Sequence[str] = ()) -> Schedule:
    """Read and check a schedule's file.

    Args:
        path: The YAML file.
        seed: What `${seed}` stands for; also given to every fit.
        flags: More words for every fit.

    Raises:
        FileNotFoundError: If the file, or a YAML file that a step names, is missing.
        ValueError: If something in it is wrong; names the step and the way out.
    """
    if seed < 0:
        raise ValueError(f"the seed is {seed}: it must be at least 0")
    content = _resolved(OmegaConf.merge({"seed": seed}, read_yaml(path)), str(path))
    unknown = sorted(set(content) - {"seed", "world", "steps"})
    if unknown:
        raise ValueError(f"{path}: unknown key {unknown[0]!r}: a schedule has world and steps")
    world, entries = content.get("world"), content.get("steps")
    if not isinstance(world, str) or not _NAME.fullmatch(world):
        raise ValueError(f"{path}: world is {world!r}: give a name of letters, digits, - and _")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: steps is {entries!r}: give a list of steps with name, run and output")
    steps = tuple(
        _read_step(entry, f"{path}, step {number}", seed, flags) for number, entry in enumerate(entries, 1)
    )
    for what, values in (
        ("name", [step.name for step in steps]),
        ("output", [step.output for step in steps]),
    ):
        twice = [value for number, value in enumerate(values) if value in values[:number]]
        if twice:
            raise ValueError(f"{path}: two steps have the {what} {twice[0]!r}: each needs its own")
    for step in steps:
        _check_configuration(step, f"{path}, step {step.name!r}")
    return Schedule(world, seed, steps)


def read_yaml(path: str | Path) -> DictConfig:
    """A YAML file whose content has names.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path} holds a list: its content must have names, `key: value`")
    return content


def _read_step(entry: Any, where: str, seed: int, flags: Sequence[str]) -> Step:
    """One entry of the list; ValueError if it is wrong."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {entry!r}: give name, run and output")
    unknown = sorted(str(key) for key in set(entry) - set(_KEYS))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}: a step has {', '.join(_KEYS)}")
    name, run, output, minutes = (entry.get(key) for key in _KEYS)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"{where}: name is {name!r}: give letters, digits, - and _")
    where = f"{where} ({name})"
    try:
        words = shlex.split(run) if isinstance(run, str) else [str(word) for word in run or []]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: run is {run!r}, no command line: {error}") from error
    if not words or words[0] not in COMMANDS:
        raise ValueError(f"{where}: run is {run!r}: it must begin with one of {', '.join(COMMANDS)}")
    if not isinstance(output, str) or not output.strip("./"):
        raise ValueError(f"{where}: output is {output!r}: name the folder or file that it leaves")
    if minutes is not None and (
        isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes <= 0
    ):
        raise ValueError(f"{where}: minutes is {minutes!r}: give a number above 0, or leave it out")
    words += flags if words[0] == "fit" else ()
    step = Step(name, tuple(words), output.removeprefix("./").rstrip("/"), minutes)
    if words[0] in SEEDED and step.option("--seed_everything") is None:
        step = Step(name, (*words, "--seed_everything", str(seed)), step.output, minutes)
    return step


def _check_configuration(step: Step, where: str) -> None:
    """Hold a step's YAML files against its output; the error comes now and not after hours."""
    try:
        configuration = step.configuration()
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    trainer = configuration.get("trainer")
    folder = step.option("--trainer.default_root_dir") or (trainer or {}).get("default_root_dir")
    if step.is_fit and folder is not None and Path(folder) != Path(step.output):
        raise ValueError(f"{where}: output is {step.output!r}, but the run goes to {folder!r}: name that")


def _resolved(content: Any, where: str) -> dict[str, Any]:
    """The content with every `${}` replaced; ValueError if one stands for nothing."""
    forbid_environment()
    try:
        found = OmegaConf.to_container(content, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where} can't be resolved: {' '.join(str(error).split())}") from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}
