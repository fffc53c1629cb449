"""Texts of users in tables: names of stores and runs, prompts and answers may hold any sign. Standard library only."""

import re

_TEX = {sign: f"\\{sign}" for sign in "_%&#${}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",  # noqa: RUF001
    "±": r"$\pm$",
    "\u00a0": "~",
}

# An underscore inside of a word is one already.
_MARKDOWN = re.compile(r"[\\|*`\[\]]|(?<![^\W_])_|_(?![^\W_])")


def one_line(text: str) -> str:
    """The same with every stretch of spaces and ends of lines as one space, but for spaces that don't break."""
    return " ".join(re.split(r"[^\S\u00a0]+", text.replace("\0", " ").strip()))


def plain(text: str) -> str:
    """Text as one line that is neither HTML nor Markdown."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\g<0>", one_line(text).replace("\u00a0", " "))


def tex(text: str) -> str:
    """Text as one line that LaTeX prints as it is."""
    return "".join(_TEX.get(sign, sign) for sign in one_line(text))
