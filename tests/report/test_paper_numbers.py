"""The numbers that were copied out of the paper."""

import os
import re
from pathlib import Path

import pytest
import yaml

from illume_lightning.report.paper import ABLATIONS, AREAS, PAPER_NUMBERS, PaperNumber, read_paper_numbers

NUMBERS = read_paper_numbers()
ALL = [(area, number) for area in (*AREAS, ABLATIONS) for number in NUMBERS[area]]


@pytest.fixture(scope="module")
def tables() -> dict[str, str]:
    """Text of the paper's tables by name; the test skips where the paper is not at hand."""
    path = Path(os.environ.get("ILLUME_PAPER", Path(__file__).parents[3] / "shared" / "paper.txt"))
    if not path.is_file():
        pytest.skip(f"no text of the paper at {path}; set ILLUME_PAPER to it")
    found, lines = {}, list[str]()
    for line in path.read_text().splitlines():
        caption = re.match(r"(Table \d+):", line)
        if caption:
            found[caption[1]] = "\n".join(lines)
        lines = [] if caption or len(line) > 400 else [*lines, line]
    return found


@pytest.mark.parametrize(("area", "number"), ALL, ids=lambda value: getattr(value, "metric", None))
def test_entries_are_complete(area: str, number: PaperNumber) -> None:
    assert isinstance(number.value, float)
    assert re.fullmatch(r"Table \d", number.source) and re.fullmatch(r"\d\.\d", number.section)
    assert number.unit in ("share", "percent", "dB", "points")
    assert number.unit != "share" or 0 <= number.value <= 1
    assert number.metric and number.benchmark and number.model


@pytest.mark.parametrize(("area", "number"), ALL, ids=lambda value: getattr(value, "metric", None))
def test_every_number_stands_in_its_table(area: str, number: PaperNumber, tables: dict[str, str]) -> None:
    rows = tables[number.source].splitlines()
    if number.model != "ablation":
        name = "ILLUME+" if number.model == "ILLUME+ 3B" else number.model
        rows = [row for row in rows if row.startswith(f"{name} ")]
    assert any(re.search(rf"(?<![\d.]){re.escape(number.printed)}%?(?![\d.])", row) for row in rows)


def test_rows_of_ablations_are_whole(tables: dict[str, str]) -> None:
    """The values of an entry stand in one row of the table, in its order, and every row of the table has an entry."""
    rows = yaml.load(PAPER_NUMBERS.read_text(), Loader=yaml.BaseLoader)["ablations"]
    for table in ("Table 6", "Table 7", "Table 8", "Table 9"):
        entries = [" ".join(row["values"].values()) for row in rows if row["source"] == table]
        # "-": not measured; in front of the values stands what the row is about.
        printed = [line.replace("%", "").replace(" - ", " ") for line in tables[table].splitlines()]
        found = [
            line
            for line in printed
            if any(
                f" {line}".removesuffix(" 6.59")
                .removesuffix(" 100")
                .endswith(f" {entry.removesuffix(' 100')}")
                for entry in entries
            )
        ]
        assert len(found) == len(entries), table
        assert len(found) == sum(bool(re.search(r"\d\.\d\d \d\d\.\d\d 0\.\d\d\d", line)) for line in printed)


def test_runs_of_ablations_are_shipped() -> None:
    """Each stands beside the results of an overlay, and each overlay has its row."""
    folder = Path(__file__).parents[2] / "experiments" / "ablations"
    files = [folder / "base.yaml", *folder.glob("table*/*.yaml")]
    runs = {str(file.relative_to(folder.parent).with_suffix("")) for file in files}
    assert {number.run for number in NUMBERS[ABLATIONS] if number.run} == runs


def test_geneval_is_there_in_full() -> None:
    beside = {number.beside: number.value for number in NUMBERS["generation"] if number.beside}
    names = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
    assert [beside[name] for name in names] == [0.99, 0.88, 0.62, 0.84, 0.42, 0.53]
    assert beside["scene"] == 0.72


def test_printed_digits_are_kept() -> None:
    (fid,) = (number for number in NUMBERS["generation"] if number.benchmark == "MJHQ-30K")
    assert (fid.shown, fid.value) == ("6.00", 6.0)


def test_a_number_without_a_source_is_refused(tmp_path: Path) -> None:
    entries = "".join(f"{area}: [{{metric: a, value: 1}}]\n" for area in AREAS)
    (tmp_path / "numbers.yaml").write_text(entries)
    with pytest.raises(ValueError, match="source"):
        read_paper_numbers(tmp_path / "numbers.yaml")
    assert read_paper_numbers(tmp_path / "none.yaml") == {}
