"""docs/reliability.md says what is run, and every row of its table is run."""

import re
from pathlib import Path

from matrix import ROWS, table

HERE = Path(__file__).parent


def test_the_table_is_the_one_that_is_run():
    document = (HERE.parents[1] / "docs" / "reliability.md").read_text()
    assert table() in document
    assert document.count("\n| ") == len(ROWS) + 1


def test_every_row_has_its_test():
    source = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    for row in ROWS:
        assert re.search(rf'ran\(ROWS\["{row}"\]\.fault, (cases|len\(cases\))\)', source), row
        assert f'@sizes("{row}")' in source or ROWS[row].cases.small == ROWS[row].cases.full, row
