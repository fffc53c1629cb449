"""Curves as SVG that takes the page's colours and needs nothing beside it."""

import io
import re
from dataclasses import dataclass, field

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, ScalarFormatter

# Stand-ins that no curve has by chance; the page's style sheet says what they look like, by day and by night.
_INK, _FAINT, _PAPER = "#01fe01", "#01fe02", "#01fe03"
COLOURS = tuple(f"#01fe1{number}" for number in range(6))
_VARIABLES = {_INK: "--soft", _FAINT: "--rule", _PAPER: "--paper"}
_VARIABLES |= {colour: f"--line{number}" for number, colour in enumerate(COLOURS)}

_SETTINGS = {
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.columnspacing": 1.2,
}


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: list[tuple[int, float]]
    """Training steps and values."""

    colour: int
    """Number of the colour; lines that belong together share it."""

    is_held_out: bool = False
    """Drawn as points: few and far between."""


@dataclass(frozen=True)
class Panel:
    """One small plot over training steps."""

    title: str
    lines: list[Line]
    marks: list[tuple[int, str]] = field(default_factory=list)
    """Steps at which stages and phases begin, and their names."""

    is_log: bool = False
    until: int = 0
    """Step at which the axis ends; that of the last point if it is later."""


def draw(panel: Panel, name: str) -> str:
    """A panel as an ``<svg>`` element.

    Args:
        panel: what to draw.
        name: of letters and digits, unique in the page: the element's own names begin with it.
    """
    with matplotlib.style.context(["default", _SETTINGS | {"svg.hashsalt": name}], after_reset=True):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for line in panel.lines:
            _add(axes, line)
        _dress(axes, panel)
        columns = 2 if len(panel.lines) in (2, 4) or max(len(line.label) for line in panel.lines) > 14 else 3
        figure.legend(loc="outside upper left", ncols=columns)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return _inline(buffer.getvalue(), name, panel.title)


def _add(axes: Axes, line: Line) -> None:
    steps, values = zip(*line.points, strict=True)
    colour = COLOURS[line.colour % len(COLOURS)]
    (drawn,) = axes.plot(steps, values, color=colour, label=line.label)
    if line.is_held_out:
        drawn.set(linestyle="none", marker="o", markersize=5, markeredgecolor=_PAPER, zorder=3)
    elif len(line.points) < 4:
        drawn.set(marker="o", markersize=4)


def _dress(axes: Axes, panel: Panel) -> None:
    if panel.is_log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    last = max(step for line in panel.lines for step, _ in line.points)
    last = max(last, panel.until)
    axes.set_xlim(-0.02 * last, 1.02 * last + 1)
    axes.set_xlabel("training step")
    for step, text in panel.marks:
        axes.axvline(step, color=_FAINT, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
        axes.annotate(
            text,
            (step, 1),
            (0, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
        )


def _inline(svg: str, name: str, title: str) -> str:
    """The ``<svg>`` alone, its names made unique and its colours the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="@">', svg, count=1
    )
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return svg.replace('aria-label="@"', f'aria-label="{label}"', 1).strip()
