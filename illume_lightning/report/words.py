"""How numbers, names and times are written in a report."""

import math
from datetime import datetime

from illume_lightning.report.scores import Score

SPACE = "\u00a0"
"""Between a number and its unit, where no line ends."""

NOTHING = "–"  # noqa: RUF001
_SHORT = {"psnr": "PSNR", "ssim": "SSIM", "dualvitok": "DualViTok"}
_SUFFIX = {"dB": f"{SPACE}dB", "nats": f"{SPACE}nats"}


def label(name: str) -> str:
    """A name of the records as words: "two_objects" is "Two objects"."""
    words = _words(name)
    return words[:1].upper() + words[1:]


def _words(name: str) -> str:
    return " ".join(_SHORT.get(word, word) for word in name.replace("-", "_").split("_"))


def number(value: float | None, unit: str, with_unit: bool = True) -> str:
    """A value in its unit; shares in per cent."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if unit == "share":
        return f"{100 * value:.1f}" + (f"{SPACE}%" if with_unit else "")
    if unit == "dB":
        text = f"{value:.2f}"
    elif unit in ("ssim", "nats"):
        text = f"{value:.3f}"
    elif unit == "distance":
        text = f"{value:.4f}"
    elif unit == "perplexity":
        text = f"{value:#.4g}"
    else:
        text = f"{value:.4g}"
    return text + (_SUFFIX.get(unit, "") if with_unit else "")


def interval(score: Score) -> str:
    """The 95 % confidence interval, without a unit; empty if there is none."""
    if score.low is None or score.high is None or score.low >= score.high:
        return ""
    low, high = (
        number(score.low, score.unit, with_unit=False),
        number(score.high, score.unit, with_unit=False),
    )
    return f"{low} to {high}"


def baselines(score: Score) -> str:
    """What other ways of answering reach: "chance 20.0 %, without picture 30.0 %"."""
    return ", ".join(f"{_words(name)} {number(value, score.unit)}" for name, value in score.baselines.items())


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def day(started: str) -> str:
    """The date, YYYY-MM-DD, of an ISO date and time; empty if it is none."""
    try:
        return datetime.fromisoformat(started).date().isoformat()
    except ValueError:
        return ""


def minute(started: str) -> str:
    """Date and time of an ISO date and time to the minute; empty if it is none."""
    try:
        return datetime.fromisoformat(started).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return ""
