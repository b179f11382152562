"""CSV files: landmarks, domain labels, the report of an alignment.

A text that a spreadsheet would take for a formula has a ' in front of it in the file.
"""

import csv
import io
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from vitface.data.images import read_text
from vitface.errors import DataError

_FORMULA = re.compile(r"[=@\t\r]|[+-](?![\d.]+$)")  # -3.5 is none


def table_text(rows: Iterable[Sequence[object]]) -> str:
    """The lines of a CSV file with these cells; `read_table` reads any text back as it was."""
    text = io.StringIO()
    writers = [csv.writer(text, lineterminator="\n", quoting=kind) for kind in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)]
    for row in rows:
        cells = [f"'{cell}" if _FORMULA.match(str(cell)) else str(cell) for cell in row]
        writers[any("\r" in cell for cell in cells)].writerow(cells)  # by itself, csv does not quote that
    return text.getvalue()


def read_table(path: str | Path, needed: Collection[str]) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file, {needed column: cell}, each after the number of its line; "" where a row is too short.

    DataError if the file cannot be read, is no CSV, or lacks one of these columns.
    """
    text = read_text(path)
    mark = next((mark for mark in ",;\t" if mark in text.partition("\n")[0]), ",")  # Excel writes ; in many countries
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=mark)
    try:
        names = [name.strip().lower() for name in next((row for row in rows if row), [])]
        places = {name: names.index(name) for name in needed if name in names}
        # only these cells are kept: a file may have many more
        found = [
            (rows.line_num, {name: _plain(row[at]) if at < len(row) else "" for name, at in places.items()})
            for row in rows
            if row
        ]
    except csv.Error as error:
        raise DataError(f"{path}: line {rows.line_num + 1} is no CSV ({error})") from None
    if lacking := [name for name in needed if name not in places]:
        raise DataError(f"{path} lacks the columns {', '.join(lacking)}; its first line must have {','.join(needed)}")
    return found


def _plain(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and _FORMULA.match(cell[1:]) else cell
