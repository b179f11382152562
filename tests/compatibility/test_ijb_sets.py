"""IJB-B and IJB-C: whole, edited, cut, and of mixed sets."""

import re

import pytest
from cases import case
from ijb import write_ijb

from vitface.data.checks.doctor import check
from vitface.data.formats.ijb_lists import read_faces, read_protocol
from vitface.errors import DataError

KIND = "IJB"
FACES, TEMPLATES, PAIRS = "name_5pts_score.txt", "face_tid_mid.txt", "template_pair_label.txt"
G1, G2, PROBES = "1N_gallery_G1.csv", "1N_gallery_G2.csv", "1N_probe_mixed.csv"


@pytest.fixture
def home(tmp_path):
    return write_ijb(tmp_path)


def read(folder):
    faces = read_faces("ijbc", folder)
    return faces, read_protocol(faces)


def edit(home, kind, change):
    """`change` takes and gives a list of lines, each a list of fields."""
    path, mark = home / "meta" / f"ijbc_{kind}", "," if kind.endswith("csv") else " "
    lines = [line.split(mark) for line in path.read_text().splitlines()]
    path.write_text("".join(mark.join(line) + "\n" for line in change(lines)))


def at(line, *fields, places=None):
    """A change that puts other fields into a line, from 1; with `places` only there."""

    def change(lines):
        old = lines[line - 1]
        new = list(fields) if places is None else old
        for place, field in zip(places or (), fields, strict=places is not None):
            new[place] = field
        return [*lines[: line - 1], new, *lines[line:]]

    return change


def cells(*order):
    return lambda lines: [[line[i] for i in order] for line in lines]


def second_again(lines):
    return [*lines[:4], lines[1], *lines[4:]]


FAULTS = [
    ("a crop's line twice", FACES, second_again, "line 5: 2.jpg has line 2, too"),
    ("a crop that is no file", FACES, at(3, "../3.jpg", places=[0]), "line 3: ../3.jpg: there is no such file in"),
    ("the score before the landmarks", FACES, cells(0, 11, *range(1, 11)), "line 1: 1.jpg: the last number, the det"),
    ("the crop's name last", FACES, cells(*range(1, 12), 0), "line 1: .* is not: crop x1 y1 .* score"),
    ("a line of landmarks cut", FACES, at(4, "4.jpg", "40.1", "50.2"), "line 4: '4.jpg 40.1 50.2' is not: crop x1"),
    ("commas for points in numbers", FACES, at(2, "46,06", places=[1]), "line 2: '2.jpg 46,06"),
    ("a landmark NaN", FACES, at(6, "nan", places=[3]), "line 6: 6.jpg: a number is NaN or infinite"),
    ("a landmark of 1e9 pixels", FACES, at(6, "1e9", places=[3]), "line 6: 6.jpg: the landmarks are no pixels"),
    ("a detector's score of 99.9", FACES, at(7, "99.9", places=[11]), "line 7: 7.jpg: .* not from 0 to 1"),
    ("five landmarks in one point", FACES, at(8, *["50"] * 10, places=range(1, 11)), "line 8: 8.jpg: .* are one point"),
    ("landmarks x1 ... x5 y1 ... y5", FACES, cells(0, 1, 3, 5, 7, 9, 2, 4, 6, 8, 10, 11), "line 1: .* no face's, nor"),
    (
        "landmarks with left and right exchanged",
        FACES,
        cells(0, 3, 4, 1, 2, 5, 6, 9, 10, 7, 8, 11),
        "left in the image",
    ),
    (
        "faces in another order",
        TEMPLATES,
        lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        "line 3: 4.jpg is not at this",
    ),
    ("the last faces cut off", TEMPLATES, lambda lines: lines[:-2], r"score.txt: line \d+: .* this place of ijbc_face"),
    ("a face too many", TEMPLATES, lambda lines: [*lines, ["x.jpg", "1", "1"]], r"line \d+: x.jpg is not at this"),
    ("a face without a media", TEMPLATES, at(5, "5.jpg", "7"), "line 5: '5.jpg 7' is not: crop template media"),
    ("a template 7.5", TEMPLATES, at(5, "7.5", places=[1]), "line 5: 5.jpg: template and media are whole numbers"),
    ("template and media exchanged", TEMPLATES, cells(0, 2, 1), r"label.txt: line 1: template \d+ has no face in"),
    ("the label first", PAIRS, cells(2, 0, 1), "line 1: .* is not: template template label"),
    ("a label 2", PAIRS, at(3, "2", places=[2]), "line 3: .* the label 0 or 1"),
    ("labels 1 and -1", PAIRS, at(4, "-1", places=[2]), "line 4: .* the label 0 or 1"),
    ("a pair cut", PAIRS, lambda lines: [*lines[:-1], lines[-1][:2]], r"line \d+: .* is not: template template label"),
    ("a pair of a template without a face", PAIRS, at(9, "1", places=[1]), "line 9: template 1 has no face in"),
    ("a pair with both labels", PAIRS, lambda x: [*x, [*x[1][:2], str(1 - int(x[1][2]))]], r"line \d+: .* of line 2,"),
    ("all pairs different", PAIRS, lambda lines: [[a, b, "0"] for a, b, _ in lines], "line 1 and all others"),
    ("no pair", PAIRS, lambda lines: [], "is empty; its lines are: template template label"),
    ("a gallery without its first line", G1, lambda lines: lines[1:], "lacks the columns template_id, subject_id"),
    ("a subject that is a name", G1, at(2, "Anna", places=[1]), "line 2: TEMPLATE_ID and SUBJECT_ID are whole numbers"),
    (
        "a template of two subjects",
        PROBES,
        lambda x: [*x, [x[1][0], "99", "", ""]],
        r"line \d+: template \d+ is of sub",
    ),
    ("a gallery's template of no face", G2, at(2, "1", places=[0]), "line 2: template 1 has no face in ijbc_face"),
    ("a gallery without a template", G2, lambda lines: lines[:1], "has no line but the first"),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        pytest.param(kind, change, message, marks=case(f"`ijbc_{kind}`: {given}", "an error names file and line"))
        for given, kind, change, message in FAULTS
    ],
)
def test_a_planted_fault_is_named_with_its_line(home, kind, change, message):
    edit(home, kind, change)
    with pytest.raises(DataError, match=message) as found:
        read(home)
    assert "ijbc_" in str(found.value) and "\n" not in str(found.value)


@case("IJB: one template in a gallery and among the probes; one person in both galleries", "an error names the line")
def test_galleries_and_probes_share_nothing(home):
    gallery = (home / "meta" / f"ijbc_{G1}").read_text().splitlines()
    edit(home, PROBES, lambda lines: [*lines, gallery[1].split(",")])
    with pytest.raises(DataError, match=rf"line \d+: template {gallery[1].split(',')[0]} is in ijbc_1N_gallery_G1.csv"):
        read(home)
    edit(home, PROBES, lambda lines: lines[:-1])
    edit(
        home,
        G2,
        lambda lines: [[line[0], gallery[1].split(",")[1], *line[2:]] if n else line for n, line in enumerate(lines)],
    )
    with pytest.raises(DataError, match=r"gallery_G2.csv: line 2: subject \d+ has template \d+ and \d+; a person"):
        read(home)


@case("IJB: a file of the three for 1:N is missing, or one of the others; a web page saved as one", "named")
def test_missing_files(home):
    (home / "meta" / f"ijbc_{G2}").rename(home / "aside")
    with pytest.raises(DataError, match=re.escape(f"{home / 'meta' / f'ijbc_{G2}'} is missing; the search 1:N needs")):
        read(home)
    (home / "aside").rename(home / "meta" / f"ijbc_{G2}")
    (home / "meta" / f"ijbc_{PAIRS}").rename(home / "aside")
    with pytest.raises(DataError, match="template_pair_label.txt is missing; put there a folder IJBC"):
        read(home)
    with pytest.raises(DataError, match=r"has no IJBB/meta/ijbb_face_tid_mid.txt; put there a folder IJBC \(or IJBB\)"):
        read_faces("ijbb", home.parent)
    (home / "meta" / f"ijbc_{FACES}").write_text("<!DOCTYPE html><html>\n")
    (home / "aside").rename(home / "meta" / f"ijbc_{PAIRS}")
    with pytest.raises(DataError, match="line 1: .*; the file is a web page, the download failed"):
        read(home)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("\n", "\r\n", marks=case("IJB's lists with Windows line ends", "read")),
        pytest.param("\n", "\n\n", marks=case("IJB's lists with blank lines", "read")),
        pytest.param(" ", "\t", marks=case("IJB's lists with tabs for spaces", "read")),
        pytest.param("", "\ufeff", marks=case("IJB's lists with a byte order mark", "read")),
    ],
)
def test_lists_as_editors_leave_them(home, old, new):
    (faces, protocol), files = read(home), sorted((home / "meta").glob("*"))
    for path in files:
        text = path.read_text()
        path.write_bytes((text.replace(old, new) if old else new + text).encode())
    again, same = read(home)
    assert again.crops == faces.crops and (again.landmarks == faces.landmarks).all() and (again.row == faces.row).all()
    assert (same.pairs == protocol.pairs).all() and (same.issame == protocol.issame).all()
    assert [found.rows.tolist() for found in same.lists] == [found.rows.tolist() for found in protocol.lists]


@case("IJB: blank lines before a wrong pair", "the error names the line as an editor counts it")
def test_lines_are_counted_as_in_an_editor(home):
    edit(home, PAIRS, lambda lines: [[], *lines[:3], [], [], ["1", *lines[3][1:]], *lines[4:]])
    with pytest.raises(DataError, match="line 7: template 1 has no face"):
        read(home)


@case("`IJB_release/IJBC`, or its folder, or `ijb-c`, named as --data-dir; no files for 1:N", "found; 1:1 alone")
def test_where_the_set_is(home, tmp_path):
    for path in (home / "meta").glob("*1N*"):
        path.unlink()
    (tmp_path / "data" / "IJB_release").mkdir(parents=True)
    home = home.rename(tmp_path / "data" / "IJB_release" / "ijb-c")
    for folder in (home, home.parent, home.parent.parent):
        faces, protocol = read(folder)
        assert faces.folder == home / "loose_crop" and protocol.lists == []


@case("IJB: pairs listed twice", "an ALARM names the line; they count twice, as in other programs")
def test_repeated_pairs(home):
    edit(home, PAIRS, lambda lines: [*lines, lines[4]])
    protocol = read(home)[1]
    assert any(
        f"line {len(protocol.pairs)} is line 5 again; 1 pairs are listed twice" in alarm for alarm in protocol.alarms
    )


@case("IJB: labels that are shifted against the pairs", "an ALARM names the first that the subjects of 1:N contradict")
def test_shifted_labels(home):
    edit(home, PAIRS, lambda x: [[*line[:2], x[n - 1][2]] for n, line in enumerate(x)])
    assert "labels are not what the subjects in the 1:N lists say" in read(home)[1].alarms[0]


@case("a set of another size than IJB-C", "evaluated, with an ALARM: its figures are not comparable")
def test_another_size(home):
    assert "the published set has 469,375 faces, 23,124 templates, 15,658,489 pairs" in read(home)[1].alarms[-1]


@case("a data folder with IJB-C, for `data check`", "its lists are read, and what is odd or wrong in them is named")
def test_data_check_reads_the_lists(home, tmp_path):
    (report,) = check(tmp_path, [], 0)
    assert report.format == "ijbc, 1:N too" and report.counts["faces"] == len(list((home / "loose_crop").iterdir()))
    assert [finding.name for finding in report.problems] == ["odd_lists"]
    edit(home, PAIRS, at(3, "2", places=[2]))
    (report,) = check(tmp_path, [], 0)
    assert report.format == "unreadable" and "line 3" in report.problems[0].what
