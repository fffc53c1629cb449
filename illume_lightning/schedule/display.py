"""What one sees of a schedule: a bar on a terminal, lines elsewhere, and tables."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from illume_lightning.schedule.steps import Step

log = logging.getLogger(__name__)

_TAIL_BYTES = 8192
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# "  12%|#### " of a bar within the bar.
_BAR = re.compile(r":?\s*\d+%\|[^|]*\|\s*")


class Display:
    """One bar over the minutes that all steps are expected to take; without a terminal a line for each event.

    Args:
        steps: All of them.
        minutes: Expected of each.
        label: Before the name of a step.
        before: Minutes of other schedules that are done.
        after: Minutes of other schedules that are still to come.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        minutes: Sequence[float],
        label: str = "",
        before: float = 0.0,
        after: float = 0.0,
    ) -> None:
        self._steps, self._minutes, self._label, self._before = steps, minutes, label, before
        # monitor_interval: no thread beside the one that starts processes.
        tqdm.monitor_interval = 0
        self._bar = tqdm(
            total=before + sum(self._minutes) + after,
            initial=before,
            disable=None,
            leave=False,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar:16}| {n:.0f}/{total:.0f} min{postfix}",
        )

    def skip(self, number: int) -> None:
        """A step is finished already."""
        self._bar.update(self._minutes[number])

    def start(self, number: int, what: str) -> None:
        """A step begins; `what` says how."""
        text = self._name(number)
        self._bar.set_description_str(text)
        if self._bar.disable:
            log.info("%s: %s", text, what)

    def progress(self, number: int, seconds: float, file: Path) -> None:
        """A step has run for some time and writes to this file."""
        if self._bar.disable:
            return
        self._bar.n = self._before + sum(self._minutes[:number]) + min(seconds / 60, self._minutes[number])
        self._bar.set_postfix_str(last_line(file))

    def end(self, number: int, seconds: float) -> None:
        """A step is finished."""
        self._bar.n = self._before + sum(self._minutes[: number + 1])
        self._bar.refresh()
        if self._bar.disable:
            log.info("%s: finished after %s", self._name(number), duration(seconds))

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _name(self, number: int) -> str:
        return f"{self._label}[{number + 1}/{len(self._steps)}] {self._steps[number].name}"


def last_line(path: Path) -> str:
    """What a log ends in; of a progress bar its name, count and rate."""
    lines = [_BAR.sub(" ", line) for line in tail(path, 1, r"[\r\n]")]
    return lines[0].strip() if lines else ""


def tail(path: Path, count: int, separator: str = r"\n") -> list[str]:
    """The last lines of a log that hold something; of those that overwrote one another, the last."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - count * _TAIL_BYTES, 0))
        text = _CODES.sub("", file.read().decode(errors="replace"))
    lines = [line.rstrip("\r").rpartition("\r")[2].strip() for line in re.split(separator, text)]
    return [line for line in lines if line][-count:]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as `1 h 04 min` or `6 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def remaining(minutes: float, unknown: int) -> str:
    """The line on how long the rest will take, such as `left: 6 min 05 s, and 2 steps of unknown length`."""
    more = f", and {unknown} steps of unknown length" if unknown else ""
    return f"left: {duration(60 * minutes)}{more}\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns as wide as their longest entry, the last column as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  ".join([*map(str.ljust, row[:-1], widths), row[-1]]).rstrip() for row in rows]
    return "\n".join(lines) + "\n"
