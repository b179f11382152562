"""Pair lists as they were published, copied, edited and unpacked."""

import unicodedata
from types import SimpleNamespace

import numpy as np
import pytest
from cases import case
from PIL import Image

from vitface.data.checks.check_people import no_names_to_compare, people_in_benchmark
from vitface.data.formats.pair_lists import read_pair_list
from vitface.data.formats.pairs import VerificationSet
from vitface.data.formats.samples import load_samples
from vitface.errors import DataError, EvaluationError
from vitface.evaluation.protocol import verify

KIND = "Lists"
JPEG = b"\xff\xd8\xff"


def image(root, name):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(JPEG + unicodedata.normalize("NFC", name).encode())


def shown(pairs):
    """The names that `image` wrote, in the order of the pairs."""
    return [data.removeprefix(JPEG).decode() for data in pairs.images]


def lfw(root, text, people=("A", "B")):
    for who in people:
        for i in (1, 2):
            image(root, f"{who}/{who}_{i:04d}.jpg")
    (root / "pairs.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_pair_list("lfw", root / "pairs.txt", root)


FOLD = "A\t1\t2\nA\t1\tB\t1\n"
EXPECTED = ["A/A_0001.jpg", "A/A_0002.jpg", "A/A_0001.jpg", "B/B_0001.jpg"] * 2


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("2\t1\n" + 2 * FOLD, marks=case("`pairs.txt` with tabs, as it was published", "read")),
        pytest.param(("2\t1\n" + 2 * FOLD).replace("\t", " "), marks=case("spaces for tabs", "read")),
        pytest.param(
            ("2\t1\n" + 2 * FOLD).replace("\n", "\t\r\n"), marks=case("Windows line ends, tabs behind", "read")
        ),
        pytest.param(("2\t1\n" + 2 * FOLD).replace("\n", "\r"), marks=case("line ends of an old Mac", "read")),
        pytest.param("\ufeff2\t1\n" + 2 * FOLD, marks=case("a byte order mark", "read")),
        pytest.param("\n2\t1\n\n" + 2 * (FOLD + "\n"), marks=case("blank lines", "read")),
    ],
)
def test_lfw_as_editors_leave_it(tmp_path, text):
    found = lfw(tmp_path, text)
    assert shown(found) == EXPECTED
    assert found.issame.tolist() == [True, False] * 2 and found.folds.tolist() == [0, 0, 1, 1]
    assert found.people.tolist() == [[0, 0], [0, 1]] * 2


@pytest.mark.parametrize(
    "separator",
    [
        pytest.param("\t", marks=case("names with spaces, separated by tabs", "read")),
        pytest.param(" ", marks=case("names with spaces, separated by spaces", "read")),
    ],
)
def test_names_with_spaces(tmp_path, separator):
    lines = ["2\t1", *2 * ("Al Sr 2|1|2", "Al Sr 2|1|B C|1")]
    found = lfw(tmp_path, "\n".join(lines).replace("|", separator), ["Al Sr 2", "B C"])
    assert shown(found)[:4] == [f"Al Sr 2/Al Sr 2_000{i}.jpg" for i in (1, 2, 1)] + ["B C/B C_0001.jpg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "1\t3000\n" + FOLD,
            "line 1 promises 1 folds of 3000 same pairs.*at least two.*begins with 10<TAB>300",
            marks=case("`pairs.txt` whose header says one fold (`1 3000`)", "error"),
        ),
        pytest.param(
            "1100\n" + FOLD,
            "one number, as View 1 of LFW .pairsDevTrain.txt.*get pairs.txt",
            marks=case("`pairsDevTrain.txt` (header `1100`)", "error: it has no folds; which list is meant"),
        ),
        pytest.param(
            3000 * FOLD,
            r"line 1 is no header but 'A\\t1\\t2'; the form is 10<TAB>300.*sed -i '1i 10\\t300' .*pairs.txt",
            marks=case("no header", "error: the form, and the command that adds it"),
        ),
        pytest.param(
            2 * FOLD,
            r"line 1 is no header but 'A\\t1\\t2'; the form is 10<TAB>300[^;]*$",
            marks=case("no header, and not all pairs", "error: the form, without that command"),
        ),
        pytest.param(
            "name,imagenum1,imagenum2,\nA,1,2,\n",
            r"head of a table.*sed -i '1s/.*/10 300/; s/,/\\t/g' .*pairs.txt$",
            marks=case(
                "Kaggle's `pairs.csv` under the name of the list", "error: the command that makes the list of it"
            ),
        ),
        pytest.param(
            "\n<!DOCTYPE html><html>\n",
            "is no pair list but a web page: the download failed",
            marks=case("a web page saved as `pairs.txt`", "named as that"),
        ),
        pytest.param(
            "2\t1\n" + FOLD + "\0" * 9,
            "line 4 has NUL bytes",
            marks=case("NUL bytes at the end of a list", "error: the line"),
        ),
        pytest.param(
            "2\t1\n" + FOLD,
            "promises 2 folds of 1 same and 1 different pairs, not 2",
            marks=case("a list cut in half", "error: both numbers"),
        ),
        pytest.param(
            "2\t1\nA\t1\t2\nA\t1\t2\nA\t1\tB\t1\nA\t1\tB\t1\n",
            "line 3 is not a different pair.*the form is",
            marks=case("same pairs first, in a list with folds", "error: the line, the form"),
        ),
        pytest.param("2\t1\nJosé\t1\t2".encode("latin-1"), "not UTF-8", marks=case("a list in Latin-1", "error")),
    ],
)
def test_lists_that_say_something_else(tmp_path, text, message):
    with pytest.raises(DataError, match=rf"pairs\.txt.*{message}"):
        lfw(tmp_path, text)


@pytest.mark.parametrize(
    ("listed", "stored"),
    [
        pytest.param("NFC", "NFD", marks=case("accents composed in the list, decomposed on the disk (macOS)", "read")),
        pytest.param("NFD", "NFC", marks=case("accents decomposed in the list, composed on the disk", "read")),
    ],
)
def test_accents(tmp_path, listed, stored):
    there, here = (unicodedata.normalize(form, "José") for form in (listed, stored))
    found = lfw(tmp_path, "2\t1\n" + 2 * FOLD.replace("A", there), [here, "B"])
    assert shown(found) == [name.replace("A", unicodedata.normalize("NFC", "José")) for name in EXPECTED]


@case("one person's accents written in both ways in one list", "one person")
def test_both_forms_are_one_person(tmp_path):
    forms = [unicodedata.normalize(form, "José") for form in ("NFC", "NFD")]
    found = lfw(tmp_path, "2\t1\n" + "".join(FOLD.replace("A", form) for form in forms), [forms[0], "B"])
    assert found.people.tolist() == [[1, 1], [1, 0]] * 2


@pytest.mark.parametrize(
    "suffix",
    [
        pytest.param(".png", marks=case("`.jpg` in the list, `.png` on the disk", "read")),
        pytest.param(".JPG", marks=case("`.jpg` in the list, `.JPG` on the disk", "read")),
        pytest.param(".jpeg", marks=case("`.jpg` in the list, `.jpeg` on the disk", "read")),
    ],
)
def test_suffixes(tmp_path, suffix):
    lfw(tmp_path, "2\t1\n" + 2 * FOLD)
    for path in tmp_path.glob("*/*.jpg"):
        path.rename(path.with_suffix(suffix))
    assert shown(read_pair_list("lfw", tmp_path / "pairs.txt", tmp_path)) == EXPECTED


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("1 AgeDB\\a b.jpg AgeDB\\2.jpg\n", marks=case("AgeDB-30 with `\\` (`AgeDB\\1.jpg`)", "read")),
        pytest.param("1 AgeDB/a b.jpg AgeDB/2.jpg\n", marks=case("AgeDB-30, a name with a space", "read")),
        pytest.param("1\tAgeDB/a b.jpg\tAgeDB/2.jpg\r\n", marks=case("the same with tabs", "read")),
        pytest.param("1 ./AgeDB/a b.jpg ./AgeDB/2.jpg\n", marks=case("AgeDB-30 with `./` in front", "read")),
    ],
)
def test_agedb(tmp_path, text):
    for name in ("a b", "2"):
        image(tmp_path, f"AgeDB/{name}.jpg")
    (tmp_path / "list.txt").write_text(text)
    assert shown(read_pair_list("agedb_30", tmp_path / "list.txt", tmp_path)) == ["AgeDB/a b.jpg", "AgeDB/2.jpg"]


@pytest.mark.parametrize(
    "line",
    [
        pytest.param("1 ..\\secret.jpg b.jpg", marks=case("`..\\` in a list", "refused: outside the folder")),
        pytest.param("1 a\\..\\..\\secret.jpg b.jpg", marks=case("`a\\..\\..\\` in a list", "refused")),
        pytest.param("1 \\\\host\\share\\a.jpg b.jpg", marks=case("a network path in a list", "refused")),
        pytest.param("1 C:\\a.jpg b.jpg", marks=case("`C:\\` in a list", "refused")),
    ],
)
def test_no_way_out_of_the_folder(tmp_path, line):
    image(tmp_path, "secret.jpg")
    image(tmp_path, "set/b.jpg")
    (tmp_path / "list.txt").write_text(line)
    with pytest.raises(DataError, match=r"list\.txt: line 1 names .* outside the folder"):
        read_pair_list("agedb_30", tmp_path / "list.txt", tmp_path / "set")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "lfw", marks=case("LFW's pairs as `label path path` (Kaggle's `lfw_ann.txt`) in `pairs.txt`", "read")
        ),
        pytest.param("cplfw", marks=case("CPLFW's pairs as `label path path`", "read")),
    ],
)
def test_labelled_copies_of_lists(tmp_path, name):
    for who in ("A", "B"):
        image(tmp_path, f"{who}/{who}_0001.jpg")
    (tmp_path / "list.txt").write_text("1 A/A_0001.jpg A/A_0001.jpg\n0 A/A_0001.jpg B/B_0001.jpg\n")
    found = read_pair_list(name, tmp_path / "list.txt", tmp_path)
    assert found.issame.tolist() == [True, False] and found.people.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a.jpg b.jpg 1\nc d.jpg b.jpg 0\n", marks=case("AgeDB-30 with the label last", "read")),
        pytest.param(
            "label path1 path2\n1 a.jpg b.jpg\n0 c d.jpg b.jpg\n", marks=case("a line of column names", "read")
        ),
        pytest.param("True a.jpg b.jpg\nfalse c d.jpg b.jpg\n", marks=case("True and False as labels", "read")),
        pytest.param("1.0 a.jpg b.jpg\n0.0 c d.jpg b.jpg\n", marks=case("1.0 and 0.0 as labels", "read")),
        pytest.param("1\ta.jpg\tb.jpg\n-1\tc d.jpg\tb.jpg\n", marks=case("1 and -1 as labels", "read")),
        pytest.param(
            "Label;Path1;Path2\n1;a.jpg;b.jpg\n0;c d.jpg;b.jpg\n", marks=case("semicolons, as Excel writes", "read")
        ),
        pytest.param(
            "path1,path2,label\na.jpg,b.jpg,1\nc d.jpg,b.jpg,0\n", marks=case("commas, the label last", "read")
        ),
        pytest.param(
            "# AgeDB\n1 a.jpg b.jpg\n# more\n0 c d.jpg b.jpg\n", marks=case("lines that begin with #", "left out")
        ),
        pytest.param(
            "1 a.jpg b.jpg\r\n0 c d.jpg b.jpg\r\n\x1a", marks=case("the end mark of DOS (Ctrl-Z)", "left out")
        ),
    ],
)
def test_labelled_lists_as_people_write_them(tmp_path, text):
    for name in ("a.jpg", "b.jpg", "c d.jpg"):
        image(tmp_path, name)
    (tmp_path / "list.txt").write_bytes(text.encode())
    for name in ("agedb_30", "lfw", "calfw"):
        found = read_pair_list(name, tmp_path / "list.txt", tmp_path)
        assert shown(found) == ["a.jpg", "b.jpg", "c d.jpg", "b.jpg"] and found.issame.tolist() == [True, False]


@pytest.mark.parametrize(
    "line", ["2 a.jpg b.jpg", "a.jpg b.jpg", "1 a.jpg", "a.jpg b.jpg 1 0 0", "x y z", "1", "1 1 1"]
)
def test_other_lines_are_no_pairs(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"{line}\n")
    with pytest.raises(DataError, match="line 1 is not `label path path`"):
        read_pair_list("agedb_30", tmp_path / "list.txt", tmp_path)


@case("CALFW whose tokens were rewritten as 0 and 1", "error: tokens are folds")
def test_calfw_without_folds(tmp_path):
    (tmp_path / "pairs.txt").write_text("a.jpg 1\nb.jpg 1\na.jpg 0\nc.jpg 0\n")
    with pytest.raises(DataError, match=r"same pairs have the tokens \[1\], expected 1, 2, ... 10"):
        read_pair_list("calfw", tmp_path / "pairs.txt", tmp_path)


@case("one fold in any other way, or a single pair", "error: a threshold comes from the other folds")
def test_one_fold_is_never_evaluated():
    with pytest.raises(DataError, match="x: one fold; its threshold comes from the others"):
        VerificationSet("x", [JPEG] * 4, np.array([True, False]), np.zeros(2, np.int64))
    distance, same = np.array([0.5, 1.5, 0.5, 1.5]), np.array([True, False] * 2)
    assert verify(distance, same, np.array([0, 0, 1, 1])).accuracy == 1
    for folds in (np.zeros(4, np.int64), np.array([0, 0, 2, 2])):
        with pytest.raises(EvaluationError, match="a fold's threshold comes from the other folds"):
            verify(distance, same, folds)


@case("`data check --against pairs.txt`, accents decomposed in the training folder", "the person is found in the list")
def test_accents_in_the_search_for_training_people(tmp_path):
    (tmp_path / "pairs.txt").write_text("2\t1\nJosé_Pé\t1\t2\n")
    for who in ("José Pé", "Ann"):
        (tmp_path / "people" / unicodedata.normalize("NFD", who)).mkdir(parents=True)
        Image.new("RGB", (112, 112)).save(tmp_path / "people" / unicodedata.normalize("NFD", who) / "1.png")
    (finding,) = people_in_benchmark(load_samples(tmp_path / "people"), tmp_path / "pairs.txt")
    assert "1 training people are named" in finding.what


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Andre_Agassi_1.jpg 1\nAndre_Agassi_2.jpg 1\n", marks=case("CPLFW's list", "names are found")),
        pytest.param(
            "1 /data/lfw/Andre_Agassi/Andre_Agassi_0001.jpg x\n", marks=case("`label path path`", "names are found")
        ),
        pytest.param(
            "1 lfw\\Andre_Agassi\\Andre_Agassi_0001.jpg x\n", marks=case("the same with `\\`", "names are found")
        ),
        pytest.param("name,imagenum1,imagenum2\nAndre_Agassi,1,2\n", marks=case("Kaggle's CSV", "names are found")),
        pytest.param("Andre_Agassi;1;2\n", marks=case("a CSV with `;`", "names are found")),
        pytest.param("1_AndreAgassi_30_m.jpg\t1\n", marks=case("AgeDB's names", "names are found")),
        pytest.param("André Agassi\t1\t2\n", marks=case("accents in the list alone", "names are found")),
    ],
)
def test_training_people_are_found_in_every_form_of_list(tmp_path, text):
    (tmp_path / "list").write_text(text)
    samples = SimpleNamespace(names=["Someone Else", "Andre Agassi", "Andre", "17"])
    (finding,) = people_in_benchmark(samples, tmp_path / "list")
    assert "1 training people are named" in finding.what and "Andre Agassi" in finding.what
    assert no_names_to_compare(samples, tmp_path / "list") == []


@pytest.mark.parametrize(
    ("text", "names", "what"),
    [
        pytest.param(
            "", ["Ann"], "has no names", marks=case("an empty list `--against`", "said: nothing was compared")
        ),
        pytest.param("1\t2\n3;4\n", ["Ann"], "has no names", marks=case("a list of numbers", "the same")),
        pytest.param(
            "Ann\t1\t2\n",
            ["0", "1"],
            "the people have numbers",
            marks=case("people with numbers for names", "said: compare faces instead"),
        ),
    ],
)
def test_where_no_names_can_be_compared_it_is_said(tmp_path, text, names, what):
    (tmp_path / "list").write_text(text)
    samples = SimpleNamespace(names=names)
    (finding,) = no_names_to_compare(samples, tmp_path / "list")
    assert (
        what in finding.what and finding.severity == "warning" and not people_in_benchmark(samples, tmp_path / "list")
    )
