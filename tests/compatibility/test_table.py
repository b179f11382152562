"""docs/compatibility.md is what the tests say."""

from pathlib import Path

from cases import page, rows


def test_the_page_is_made_from_the_tests():
    text = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert text == page(), "run: python tests/compatibility/cases.py > docs/compatibility.md"


def test_no_case_is_listed_twice():
    given = [(kind, case[0]) for kind, cases in rows().items() for case in cases]
    assert len(given) == len(set(given))
