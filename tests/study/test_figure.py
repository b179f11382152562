"""The picture of a map: every lead at its place, and blue only where it is sure."""

from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitface.study.figure import LEFT, RIGHT, SURE, figure

SVG = "{http://www.w3.org/2000/svg}"


def row(arm, lead=None):
    found = {} if lead is None else {"all": {"difference": lead[0], "interval": lead[1:]}}
    return {"setting": "base", "arm": arm, "lead": found}


def drawn(rows):
    """[([x of the dot, x of the interval's ends], colour, label)] and {value: x} of the ticks."""
    root = ElementTree.fromstring(figure(rows, "all"))  # noqa: S314 - our own picture
    dots, texts = root.findall(f"{SVG}circle"), root.findall(f"{SVG}text")
    lines = [line for line in root.findall(f"{SVG}line") if "stroke-width" in line.attrib]
    labels = [text.text for text in texts if ": over " in str(text.text)]
    at = {float(str(text.text)): float(text.attrib["x"]) for text in texts if text.attrib["text-anchor"] == "middle"}
    found = [
        ([float(dot.attrib["cx"]), *(float(line.attrib[x]) for x in ("x1", "x2"))], dot.attrib["fill"], label)
        for dot, line, label in zip(dots, lines, labels, strict=True)
    ]
    return found, at


LEADS = st.tuples(*[st.floats(-0.3, 0.3)] * 3).map(sorted).map(lambda three: (three[1], three[0], three[2]))


@given(st.lists(LEADS, min_size=1, max_size=8))
def test_every_lead_is_at_its_place(leads):
    found, at = drawn([row("oracle"), *(row(f"arm {n}", lead) for n, lead in enumerate(leads))])
    assert len(found) == len(leads) and 0 in at
    (first, x), (last, x2) = min(at.items()), max(at.items())
    pixels = (x2 - x) / (last - first)  # in a point
    for number, ((difference, low, high), (places, colour, label)) in enumerate(zip(leads, found, strict=True)):
        for value, place in zip((difference, low, high), places, strict=True):
            assert place == pytest.approx(at[0] + 100 * value * pixels, abs=0.2 + 0.002 * abs(100 * value * pixels))
            assert LEFT <= place <= RIGHT
        assert (colour == SURE) == (low > 0 or high < 0)
        assert label == f"base: over arm {number}"


def test_a_map_of_the_oracle_alone_is_an_empty_picture():
    assert drawn([row("oracle")])[0] == []
