"""The French pages say what the English ones say: the same commands word for word, the same numbers in each section."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = {"README.fr.md": "README.md", "docs/fr/how_it_works.md": "docs/how_it_works.md"}
ELSEWHERE = re.compile(r"^## Read the core.*?(?=^## )", re.MULTILINE | re.DOTALL)  # the French page links to it
NUMBER = re.compile(r"(?<![\w.-])\d{1,3}(?:,\d{3})+(?:\.\d+)?|(?<!\w)\d+(?:\.\d+)?")


def blocks(text: str) -> list[str]:
    """The lines of the indented blocks without their comments: what is typed or computed."""
    lines = re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line).rstrip() for line in lines]


def commands(text: str) -> list[str]:
    return [line for line in blocks(text) if re.match(r"(pip|python|vitface|torchrun|import|model|embeddings)\b", line)]


def sections(text: str) -> list[str]:
    """What stands under each heading, without links, images' names, commands and marks of tests."""
    text = re.sub(
        r"\]\([^)]*\)|<!--.*?-->|^    (?:pip|python|vitface|torchrun) .*?(?=#|$)|`[^`]*`", "]", text, flags=re.M
    )
    return re.split(r"^## .*$", text, flags=re.MULTILINE)


def english(text: str) -> str:
    """French text with its numbers as in English: 1 234,5 (with a narrow space) becomes 1,234.5."""
    return re.sub(r"(?<=\d)\u202f(?=\d{3})", "\0", re.sub(r"(?<=\d),(?=\d)", ".", text)).replace("\0", ",")


def numbers(text: str) -> Counter[str]:
    return Counter(NUMBER.findall(text))


@pytest.mark.parametrize(("french", "original"), PAGES.items())
def test_a_french_page_has_the_commands_and_numbers_of_the_english_one(french, original):
    theirs, ours = ((ROOT / page).read_text(encoding="utf-8") for page in (original, french))
    assert commands(ours) == commands(theirs), f"{french} is to have the commands of {original}"
    expected = sections(ELSEWHERE.sub("", theirs))
    found = sections(english(ours))
    kept = [numbers(section) for section in expected if numbers(section)]
    assert [numbers(section) for section in found if numbers(section)] == kept, f"{french} is to have its numbers"
    assert len(ours.splitlines()) <= 1.15 * len(theirs.splitlines())
    for target in re.findall(r"\]\(((?!http)[^)#]+)", ours):
        assert ((ROOT / french).parent / target).exists(), target


def test_a_number_or_a_flag_that_differs_is_noticed():
    assert numbers(english("1\u202f498 lignes, 91,63 ± 0,53 %")) == numbers("1,498 lines, 91.63 ± 0.53 %")
    assert numbers(english("21\u202f628\u202f800")) == {"21,628,800": 1} != numbers("21,628,801")
    assert commands("    vitface embed a b   # tout\n") == ["vitface embed a b"] != ["vitface embed a c"]
    assert [numbers(part) for part in sections("a 1\n## B 2\nc 3, `4`, [x](5)\n")] == [{"1": 1}, {"3": 1}]


def test_both_readmes_name_each_other_and_are_short():
    for page in PAGES:
        assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= (90 if page.startswith("README") else 400)
    assert "(README.fr.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/fr/how_it_works.md)" in (ROOT / "README.fr.md").read_text(encoding="utf-8")
