"""The house: imports go only downwards, and some things are nowhere to be found."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    *sorted(path for folder in ("illume_lightning", "callbacks") for path in (ROOT / folder).rglob("*.py")),
    ROOT / "cli.py",
]

EVALUATION = ("illume_lightning.evaluation",)
BENCHMARKS = ("illume_lightning.eval",)
APP = ("illume_lightning.app",)
SCHEDULE = ("illume_lightning.schedule",)
REPORT = ("illume_lightning.report",)
BUDGET = ("illume_lightning.budget",)
SIDE_BY_SIDE = (*EVALUATION, *BENCHMARKS, *APP, *SCHEDULE, *REPORT, *BUDGET)
REPRODUCTION = ("illume_lightning.reproduction",)
TOP = ("callbacks", *REPRODUCTION, "illume_lightning.commands", "cli")
WITHOUT_TORCH = (
    "torch",
    "lightning",
    "litdata",
    "illume_lightning.nn",
    "illume_lightning.data",
    "illume_lightning.lit",
)

FORBIDDEN_IMPORTS = {
    "illume_lightning/nn": (
        *("lightning", "litdata", "gradio", "illume_lightning.data", "illume_lightning.lit"),
        *SIDE_BY_SIDE,
        *TOP,
    ),
    "illume_lightning/data": (
        *("lightning", "gradio", "illume_lightning.nn", "illume_lightning.lit"),
        *SIDE_BY_SIDE,
        *TOP,
    ),
    "illume_lightning/lit": ("gradio", *SIDE_BY_SIDE, *TOP),
    "illume_lightning/evaluation": ("gradio", *BENCHMARKS, *APP, *SCHEDULE, *REPORT, *BUDGET, *TOP),
    "illume_lightning/eval": ("gradio", *EVALUATION, *APP, *SCHEDULE, *REPORT, *BUDGET, *TOP),
    "illume_lightning/app": (
        "lightning",
        "litdata",
        *EVALUATION,
        *BENCHMARKS,
        *SCHEDULE,
        *REPORT,
        *BUDGET,
        *TOP,
    ),
    "illume_lightning/schedule": (
        *("numpy", "gradio"),
        *WITHOUT_TORCH,
        *EVALUATION,
        *BENCHMARKS,
        *APP,
        *REPORT,
        *BUDGET,
        *TOP,
    ),
    "illume_lightning/report": (
        "gradio",
        *WITHOUT_TORCH,
        *EVALUATION,
        *BENCHMARKS,
        *APP,
        *SCHEDULE,
        *BUDGET,
        *TOP,
    ),
    "illume_lightning/budget": (
        *("gradio", "litdata"),
        *EVALUATION,
        *BENCHMARKS,
        *APP,
        *SCHEDULE,
        *REPORT,
        *TOP,
    ),
    "illume_lightning/reproduction": (
        "gradio",
        *SIDE_BY_SIDE,
        *("callbacks", "illume_lightning.commands", "cli"),
    ),
    "callbacks": (
        "gradio",
        *REPRODUCTION,
        *BENCHMARKS,
        *APP,
        *SCHEDULE,
        *REPORT,
        *BUDGET,
        "illume_lightning.commands",
        "cli",
    ),
}
STANDARD_LIBRARY_ONLY = (
    "illume_lightning/resolution.py",
    "illume_lightning/vocabulary.py",
    "illume_lightning/image_layout.py",
    "illume_lightning/grammar.py",
    "illume_lightning/escaping.py",
)

FORBIDDEN_TEXT = {
    r"\.cuda\(": "devices come from the trainer",
    r"save_hyperparameters\(": "it would override the YAML on resume",
    r"weights_only=False": "checkpoints are never unpickled",
    r"\btorch\.load\((?!.*weights_only=True)": "checkpoints are read by nn/plain_file.py",
    r"\bpickle\.loads?\(|\bdill\b|\bjoblib\b|allow_pickle=True": "nothing is ever unpickled",
    r"yaml\.(unsafe_|full_)?load(_all)?\((?!.*Loader=yaml\.BaseLoader)": "YAML is yaml.safe_load's",
    r"shell=True|os\.(system|popen)\(": "no text becomes a command",
    r"trust_remote_code": "no code comes with weights",
    r"\beval\(['\"\w]": "nothing is evaluated as code",
    r"except( Exception)?:": "errors are never swallowed",
}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    for floor, forbidden in FORBIDDEN_IMPORTS.items():
        if place.startswith(floor + "/"):
            for name in imports(path):
                assert not any(name == bad or name.startswith(bad + ".") for bad in forbidden), (
                    f"{place}: {name}"
                )
    if place in STANDARD_LIBRARY_ONLY:
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "numpy", "lightning", "PIL"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 420, "split it where it has two reasons to change"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has {lines} lines"
    for pattern, reason in FORBIDDEN_TEXT.items():
        found = re.search(pattern, text)
        assert not found, f"{found and found.group()!r}: {reason}"


def test_only_one_file_knows_the_sizes() -> None:
    """The released table of semantic input sizes stands in resolution.py alone."""
    for path in SOURCES:
        if path.name != "resolution.py":
            assert not re.search(r"\(?448, ?336\)?|728, ?364", path.read_text()), path
