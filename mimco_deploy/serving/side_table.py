"""A CSV or Parquet file whose columns a condition may name; see `filters.py`."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mimco_deploy.serving.scan import readable


@dataclass(frozen=True)
class SideTable:
    """A table as it is read."""

    names: list[str]
    kinds: list[str]
    """NUMERIC, where what looks like a number is one, or TEXT."""
    rows: Iterable[Sequence[object]]


def read_side_table(table: Path) -> SideTable:
    """Open a CSV or Parquet file.

    Args:
        table: `.parquet`, or any other suffix for CSV in UTF-8 whose first row names the columns.

    Returns:
        Its columns, and its rows as they are read.

    Raises:
        OSError, ValueError, csv.Error: it cannot be read.
        MissingExtraError: Parquet without pyarrow.
    """
    if table.suffix.lower() == ".parquet":
        return _read_parquet(table)
    content = table.read_bytes().decode("utf-8-sig", "surrogateescape")  # once: a pipe can be read no second time
    rows = _csv_rows(content)
    names = next(rows, [])
    codes = [False] * len(names)
    for row in rows:
        codes = [seen or _is_code(field) for seen, field in zip(codes, row, strict=True)]
    rows = _csv_rows(content)
    next(rows, [])
    return SideTable(
        names, ["TEXT" if code else "NUMERIC" for code in codes], ([_no_text(field) for field in row] for row in rows)
    )


_CODE = re.compile(r"0\d")
_LARGEST = 19, str(2**63 - 1)


def column_names(table: Path) -> list[str]:
    """The names of a table's columns, of which no more is read than tells them.

    Raises:
        OSError, ValueError, csv.Error: they cannot be read, or are told once only, as by a pipe.
        MissingExtraError: Parquet without pyarrow.
    """
    if not table.is_file():
        raise ValueError("no file")
    if table.suffix.lower() == ".parquet":
        return _read_parquet(table).names
    with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        return [readable(field) for field in next(filter(None, csv.reader(file)), [])]


def _is_code(field: str) -> bool:
    """Whether it is no number for whoever wrote it: its zeros count, or all its digits, of which SQLite keeps 15."""
    return _CODE.match(field) is not None or (field.isdecimal() and (len(field), field) > _LARGEST)


def _no_text(field: str) -> str | None:
    """An empty field says nothing, as NULL does; as a text it would be above all numbers."""
    return None if field == "" or field.lower() == "nan" else field


def _csv_rows(content: str) -> Iterator[list[str]]:
    width = 0
    for row in csv.reader(io.StringIO(content, newline="")):
        if not row:  # an empty line, as csv.DictReader sees it
            continue
        width = width or len(row)
        if len(row) != width:
            raise ValueError(f"a row of {len(row)} fields where the first has {width}")
        yield [readable(field) for field in row]


def _read_parquet(table: Path) -> SideTable:
    from mimco_deploy.serving.interchange import import_pyarrow  # a search without such a table needs none of it

    pyarrow = import_pyarrow()
    file = pyarrow.parquet.ParquetFile(table)
    fields = [one for one in file.schema_arrow if not pyarrow.types.is_nested(one.type)]
    names = [one.name for one in fields]

    def rows() -> Iterator[Sequence[object]]:
        with file:
            for batch in file.iter_batches(columns=names):
                for row in batch.to_pylist():
                    yield [_plain(row[name]) for name in names]

    types = pyarrow.types
    numeric = [
        types.is_integer(one.type) or types.is_floating(one.type) or types.is_decimal(one.type) for one in fields
    ]
    return SideTable(names, ["NUMERIC" if number else "TEXT" for number in numeric], rows())


def _plain(value: object) -> object:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)  # SQLite has no such integers
    return value if isinstance(value, int | float | str | bytes | None) else str(value)
