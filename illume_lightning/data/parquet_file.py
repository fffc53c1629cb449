"""Parquet files, cut between row groups into stretches that are read each by itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from illume_lightning.data.input_file import InputFile

_BATCH_ROWS = 64


@dataclass(frozen=True)
class ParquetRows:
    """Row groups of a parquet file."""

    file: InputFile
    groups: tuple[int, ...]
    first: int
    """Number of the first row in the file, from 0."""

    num_items: int
    columns: tuple[str, ...]
    """Names of the columns to read."""

    def read(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Read the rows, a few at a time, with their places: "file.parquet#16" is the 17th row.

        Raises:
            ValueError: If the file is damaged.
        """
        for row, record in enumerate(self._records(), self.first):
            yield f"{self.file.name}#{row}", record

    def _records(self) -> Iterator[dict[str, Any]]:
        import pyarrow
        from pyarrow import parquet

        groups, columns = list(self.groups), list(self.columns)
        try:
            with parquet.ParquetFile(self.file.path) as opened:
                for batch in opened.iter_batches(_BATCH_ROWS, groups, columns, use_threads=False):
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.file.path} is damaged ({error}); fetch it again and continue") from error


def scan_parquet(file: InputFile, part_items: int) -> tuple[Any, list[ParquetRows]]:
    """Gather row groups until they have enough rows.

    Args:
        file: The file; only its footer is read.
        part_items: Fewest rows of a stretch, but for the last one.

    Returns:
        The file's Arrow schema, and its stretches, with all columns.

    Raises:
        ValueError: If it is no parquet file, or a damaged one.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"reading {file.path} needs pyarrow: pip install pyarrow") from error
    try:
        opened = parquet.ParquetFile(file.path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file.path} is not a readable parquet file ({error}); fetch it again") from error
    stretches: list[ParquetRows] = []
    with opened:
        schema = opened.schema_arrow
        groups: list[int] = []
        row = count = 0
        for group in range(opened.num_row_groups):
            groups.append(group)
            count += opened.metadata.row_group(group).num_rows
            if count >= part_items or group == opened.num_row_groups - 1:
                stretches.append(ParquetRows(file, tuple(groups), row, count, tuple(schema.names)))
                groups, row, count = [], row + count, 0
    return schema, stretches
