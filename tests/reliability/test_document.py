"""docs/reliability.md says what is run, and every row of its table is run."""

import re
from pathlib import Path

import hostile
import pytest
from matrix import ROWS, table

HERE = Path(__file__).parent


def test_the_table_is_the_one_that_is_run():
    document = (HERE.parents[1] / "docs" / "reliability.md").read_text()
    assert table() in document
    assert document.count("\n| ") == len(ROWS) + len(hostile.ROWS) + 2


def test_every_row_has_its_test():
    source = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    for row in ROWS:
        assert re.search(rf'ran\(ROWS\["{row}"\]\.fault, (cases|len\(cases\))\)', source), row
        assert f'@sizes("{row}")' in source or ROWS[row].cases.small == ROWS[row].cases.full, row


def test_the_part_on_hostile_surroundings_names_tests_that_are_there():
    document = (HERE.parents[1] / "docs" / "reliability.md").read_text()
    assert hostile.missing() == []
    for row in hostile.ROWS:
        assert f"\n| {row.given} | {row.outcome} | " in document, "run: python tests/reliability/hostile.py"


@pytest.mark.slow
def test_it_counts_no_case_that_is_not_run():
    found, document = hostile.counts(), (HERE.parents[1] / "docs" / "reliability.md").read_text()
    for row in hostile.ROWS:
        (counted,) = re.findall(rf"\| {re.escape(row.given)} \| .* \| (\d+) \|", document)
        assert 0 < int(counted) <= sum(found[test] for test in hostile.ids(row)), row.given
