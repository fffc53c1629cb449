"""Which curves are drawn of each part."""

from collections.abc import Sequence
from dataclasses import dataclass

from illume_lightning.report.curves import Line, Panel, draw
from illume_lightning.report.metrics import Metrics
from illume_lightning.report.runs import Gap, Run
from illume_lightning.report.words import label


@dataclass(frozen=True)
class HeldOut:
    """A run's last held-out metrics: a row for each data set, a column for each metric."""

    title: str
    step: int
    columns: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class CurveGroup:
    """The curves of one part, or of the MLLM's stages one after another."""

    title: str
    text: str
    """What the marks in the panels mean."""

    curves: list[tuple[str, str]]
    """Titles, and SVG."""

    held_out: list[HeldOut]
    notes: list[str]
    gaps: list[Gap]


def curve_groups(runs: Sequence[Run]) -> list[CurveGroup]:
    """The groups in the order of the runs."""
    stages = [run for run in runs if run.is_mllm]
    groups: list[CurveGroup] = []
    for run in runs:
        if not run.is_mllm:
            groups.append(_group(run.title, [run], len(groups)))
        elif run is stages[0]:
            groups.append(_group("MLLM", stages, len(groups)))
    return groups


def _group(title: str, runs: Sequence[Run], number: int) -> CurveGroup:
    trained = [run for run in runs if run.metrics.series]
    marks, meanings = _marks(trained)
    panels = _panels(runs[0].part, trained)
    until = sum(run.metrics.last_step + 1 for run in trained)
    curves = [
        (panel.title, draw(Panel(panel.title, panel.lines, marks, panel.is_log, until), f"c{number}p{index}"))
        for index, panel in enumerate(panels)
        if panel.lines
    ]
    return CurveGroup(
        title,
        "; ".join(meanings),
        curves,
        [held_out for run in trained if (held_out := _held_out(run)).rows],
        [f"{run.title}: {note}" for run in runs for note in run.metrics.notes],
        [run.gap for run in runs if run.gap],
    )


def _panels(part: str, runs: Sequence[Run]) -> list[Panel]:
    if not runs:
        return []
    if part.startswith("mllm"):
        return _mllm_panels(runs)
    metrics = runs[0].metrics
    if part == "dualvitok":
        losses = [Line("pixel loss", *_points(metrics, "train/pixel_loss", 0))]
        losses += [Line("semantic loss", *_points(metrics, "train/semantic_loss", 1))]
    elif part == "vision_encoder":
        losses = [Line("captions", *_points(metrics, "train/caption_loss", 0))]
        losses += [Line("regions", *_points(metrics, "train/region_loss", 1))]
    else:
        losses = [Line("loss", *_points(metrics, "train/loss", 0))]
    measure = "words" if part == "vision_encoder" else "psnr"
    names = [name for name in metrics.series if name.startswith("val/") and measure in name.split("/")]
    title = "Held-out words named, share right" if part == "vision_encoder" else "Held-out PSNR, dB"
    labels = _distinct([name.split("/")[2 if part == "vision_encoder" else 1] for name in names])
    held_out = [
        Line(text, metrics.series[name], number)
        for number, (text, name) in enumerate(zip(labels, names, strict=True))
        if len(metrics.series[name]) > 1
    ]
    return [
        Panel("Training loss", [line for line in losses if line.points], is_log=True),
        Panel(title, held_out),
    ]


def _distinct(names: Sequence[str]) -> list[str]:
    """Names without the words that all of them begin with."""
    words = [name.split("-") for name in names]
    shared = 0
    while len(words) > 1 and all(len(own) > shared + 1 and own[shared] == words[0][shared] for own in words):
        shared += 1
    return ["-".join(own[shared:]) for own in words]


def _points(metrics: Metrics, name: str, colour: int) -> tuple[list[tuple[int, float]], int]:
    return metrics.series.get(name, []), colour


def _mllm_panels(runs: Sequence[Run]) -> list[Panel]:
    """The whole loss, then each task's own: of codes where it makes pictures, of words where it doesn't."""
    joined = _joined(runs)
    tasks = dict.fromkeys(
        parts[1] for name in joined if len(parts := name.split("/")) == 3 and parts[0] == "train"
    )
    panels = [Panel("All tasks: training loss", _both(joined, "loss", "loss", 0), is_log=True)]
    right = [
        (f"{task}: {label(name).lower()}", joined[f"val/{task}/{name}"])
        for task in tasks
        for name in ("all", "scene", "edit")
        if f"val/{task}/{name}" in joined
    ]
    lines = [Line(text, points, number) for number, (text, points) in enumerate(right)]
    panels.append(Panel("Held-out answers and pictures, share right", lines))
    for task in tasks:
        if f"train/{task}/semantic_loss" in joined:
            lines = _both(joined, f"{task}/semantic_loss", "semantic codes", 0)
            lines += _both(joined, f"{task}/pixel_loss", "pixel codes", 1)
        else:
            lines = _both(joined, f"{task}/text_loss", "words", 2)
        panels.append(Panel(f"{label(task)}: loss, nats a token", lines, is_log=True))
    return panels


def _both(series: dict[str, list[tuple[int, float]]], name: str, shown: str, colour: int) -> list[Line]:
    lines = [
        Line(shown, series.get(f"train/{name}", []), colour),
        Line(f"{shown}, held-out", series.get(f"val/{name}", []), colour, is_held_out=True),
    ]
    # A logarithm has no place for what fell to zero.
    lines = [
        Line(line.label, [p for p in line.points if p[1] > 0], colour, line.is_held_out) for line in lines
    ]
    return [line for line in lines if line.points]


def _offsets(runs: Sequence[Run]) -> list[int]:
    """Step of the whole training at which each run begins."""
    offsets = [0]
    for run in runs:
        offsets.append(offsets[-1] + run.metrics.last_step + 1)
    return offsets[:-1]


def _joined(runs: Sequence[Run]) -> dict[str, list[tuple[int, float]]]:
    joined: dict[str, list[tuple[int, float]]] = {}
    for run, offset in zip(runs, _offsets(runs), strict=True):
        for name, points in run.metrics.series.items():
            joined.setdefault(name, []).extend((step + offset, value) for step, value in points)
    return joined


def _marks(runs: Sequence[Run]) -> tuple[list[tuple[int, str]], list[str]]:
    """Where stages and phases begin, by the logged phase; and in words what each of them is."""
    marks, meanings = [], []
    for run, offset in zip(runs, _offsets(runs), strict=True):
        phases = run.metrics.phases()
        planned = run.config.get("curriculum")
        planned = planned.get("phases") if isinstance(planned, dict) else None
        for number, phase in enumerate(phases):
            stage = run.part.removeprefix("mllm_stage") if run.is_mllm else ""
            name = (
                f"{stage}-{phase.index + 1}" if stage and len(phases) > 1 else stage or str(phase.index + 1)
            )
            if len(phases) > 1 or len(runs) > 1:
                marks.append((offset + (phase.first_step if number else 0), name))
                side = f"{phase.side} px" if phase.side else ""
                meanings.append(f"{name}: {_mode(planned, phase.index)}{side}".strip(": "))
    return marks, meanings


def _mode(planned: object, index: int) -> str:
    if not isinstance(planned, list) or index >= len(planned) or not isinstance(planned[index], dict):
        return ""
    mode = str(planned[index].get("mode", ""))
    return {"fixed": "", "any_resolution": "any resolution up to "}.get(mode, f"{mode.replace('_', ' ')}, ")


def _held_out(run: Run) -> HeldOut:
    rows = run.metrics.validations()
    columns = list(dict.fromkeys(metric for row in rows.values() for metric in row))
    cells = [
        (data, [f"{row[column]:.4g}" if column in row else "" for column in columns])
        for data, row in rows.items()
    ]
    return HeldOut(run.title, run.metrics.last_step + 1, [label(column) for column in columns], cells)
