"""The pair lists of LFW, CALFW and CFP: which images make a pair, in which fold; a fault is named with its line."""

import numpy as np
import pytest
from bin_files import JPEG

from vitface.data.formats.pair_lists import read_pair_list
from vitface.errors import DataError


def image(tag):
    return JPEG + tag.encode()


def lfw(root, lines, people):
    for person, count in people.items():
        (root / person).mkdir()
        for i in range(1, count + 1):
            (root / person / f"{person}_{i:04d}.jpg").write_bytes(image(f"{person}{i}"))
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    return root / "pairs.txt", root


LFW_LINES = ["2\t2", "A\t1\t2", "B\t1\t3", "A\t1\tB\t1", "B\t2\tC\t1", "B\t1\t2", "A\t2\t1", "C\t1\tA\t2", "C\t1\tB\t3"]


def test_lfw_pairs(tmp_path):
    listed = lfw(tmp_path, LFW_LINES, {"A": 2, "B": 3, "C": 0})
    (tmp_path / "C" / "C_0001.png").write_bytes(b"\x89PNG\r\n\x1a\nC1")
    found = read_pair_list("lfw", *listed)
    named = [x.removeprefix(JPEG).removeprefix(b"\x89PNG\r\n\x1a\n").decode() for x in found.images]
    assert list(zip(named[::2], named[1::2], strict=True)) == [
        ("A1", "A2"),
        ("B1", "B3"),
        ("A1", "B1"),
        ("B2", "C1"),
        ("B1", "B2"),
        ("A2", "A1"),
        ("C1", "A2"),
        ("C1", "B3"),
    ]
    assert found.issame.tolist() == [True, True, False, False] * 2
    assert found.folds.tolist() == [0] * 4 + [1] * 4
    assert found.images[0] is found.images[4] and found.name == "lfw"


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [
        (0, "2", "line 1 has one number, as View 1 of LFW"),
        (0, "two 2", "line 1 has 'two'"),
        (0, "0 0", "promises 0 folds"),
        (0, "10 300", "promises 10 folds of 300 same and 300 different pairs, not 8"),
        (1, "A\t1\tB\t2", "line 2 is not a same pair"),
        (3, "A\t1\t2", "line 4 is not a different pair"),
        (1, "A\t1\tx", "line 2 has 'x'"),
        (1, "A\t1\t-2", "line 2 has '-2'"),
        (1, "A\t1\t" + "9" * 5000, "line 2 has '999"),
        (1, "A\t1\t3", "line 2 names an image that cannot be read: .*A_0003.jpg: No such file"),
        (1, "../A\t1\t2", "line 2 names '../A/../A_0001.jpg', which is outside"),
        (1, "..\t1\t2", "line 2 names '../.._0001.jpg', which is outside"),
        (1, "A\0\t1\t2", "line 2 has NUL bytes"),
        (1, "/A\t1\t2", "line 2 names "),
        (1, "C:\\A\t1\t2", "line 2 names "),
    ],
)
def test_lfw_faults_name_the_line(tmp_path, number, line, message):
    lines = LFW_LINES.copy()
    lines[number] = line
    listed = lfw(tmp_path, lines, {"A": 2, "B": 3, "C": 1})
    with pytest.raises(DataError, match=message):
        read_pair_list("lfw", *listed)


def calfw(root, pairs):
    for name in {name for pair in pairs for name in pair[:2]}:
        (root / name).write_bytes(image(name))
    (root / "pairs.txt").write_text("".join(f"{a} {t}\n{b} {t}\n" for a, b, t in pairs))
    return root / "pairs.txt", root


def test_calfw_pairs_balance_the_folds(tmp_path):
    same = [(f"s{i}a.jpg", f"s{i}b 2.jpg", 1 + i // 3) for i in range(30)]
    different = [(f"d{i}.jpg", f"s{i}a.jpg", 0) for i in range(30)]
    found = read_pair_list("calfw", *calfw(tmp_path, same + different))
    assert found.issame.tolist() == [True] * 30 + [False] * 30
    assert found.folds[:30].tolist() == [i // 3 for i in range(30)]
    assert found.folds[30:].tolist() == [i % 10 for i in range(30)]
    for fold in range(10):
        assert found.issame[found.folds == fold].tolist() == [True] * 3 + [False] * 3
    assert found.images[:2] == [image("s0a.jpg"), image("s0b 2.jpg")]
    assert found.images[60:62] == [image("d0.jpg"), image("s0a.jpg")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty file"),
        ("a.jpg 1\n", "1 lines, expected two per pair"),
        ("a.jpg 1\nb.jpg 0\n", "line 2 and the one before are a pair, but have the tokens 1 and 0"),
        ("a.jpg 1\nb.jpg\n", "line 2 has ''"),
        ("a.jpg 1\nb.jpg x\n", "line 2 has 'x'"),
        ("a.jpg 1\n\nb.jpg x\n", "line 3 has 'x'"),
        ("a.jpg 2\nb.jpg 2\n", r"tokens \[2\]"),
        ("a.jpg 0\nb.jpg 0\n", r"tokens \[\]"),
        ("a.jpg 1\nc.jpg 1\na.jpg 2\nb.jpg 2\n", "line 1 or the next names an image that cannot be read: .*c.jpg"),
        ("../a.jpg 1\nb.jpg 1\n", "line 1 names '../a.jpg', which is outside"),
        ("a.jpg 1\ngif.jpg 1\na.jpg 2\nb.jpg 2\n", "image 1 is neither JPEG nor PNG"),
    ],
)
def test_calfw_faults_name_the_line(tmp_path, text, message):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(image(name))
    (tmp_path / "gif.jpg").write_bytes(b"GIF89a")
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_pair_list("calfw", tmp_path / "pairs.txt", tmp_path)


def cfp(root):
    """Two folds would do for reading, but CFP has ten: each with one same pair and one different pair per protocol."""
    protocol = root / "Protocol"
    for letter, kind in (("F", "frontal"), ("P", "profile")):
        lines = []
        for i in range(1, 12):
            path = root / "Data" / kind / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(f"{letter}{i}"))
            lines.append(f"{i} ../Data/{kind}/{i}.jpg")
        protocol.mkdir(exist_ok=True)
        (protocol / f"Pair_list_{letter}.txt").write_text("\n".join(lines))
    for kind in ("FP", "FF"):
        for fold in range(1, 11):
            folder = protocol / "Split" / kind / f"{fold:02d}"
            folder.mkdir(parents=True)
            (folder / "same.txt").write_text(f"{fold},{fold}\n")
            (folder / "diff.txt").write_text(f"{fold},{fold + 1}\n")
    return protocol


@pytest.mark.parametrize(("kind", "right"), [("FP", "P"), ("FF", "F")])
def test_cfp_pairs_take_the_second_image_from_the_right_list(tmp_path, kind, right):
    found = read_pair_list(f"cfp_{kind.lower()}", cfp(tmp_path) / "Pair_list_F.txt", tmp_path)
    expected = [image(x) for i in range(1, 11) for x in (f"F{i}", f"{right}{i}", f"F{i}", f"{right}{i + 1}")]
    assert found.images == expected and found.name == f"cfp_{kind.lower()}"
    assert found.issame.tolist() == [True, False] * 10 and found.folds.tolist() == np.repeat(np.arange(10), 2).tolist()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("Pair_list_P.txt", "1 ../../secret.jpg", "line 1 names '../../secret.jpg', which is outside"),
        ("Pair_list_P.txt", "1 /etc/passwd", "line 1 names '/etc/passwd', which is outside"),
        ("Pair_list_P.txt", "x ../Data/profile/1.jpg", "line 1 has 'x'"),
        ("Pair_list_P.txt", "1", "line 1 "),
        ("Pair_list_P.txt", "1 ../Data/profile/1.jpg", r"01/diff.txt: line 1 names the images 1 and 2"),
        ("Split/FP/03/diff.txt", "3", "diff.txt: line 1 has ''"),
        ("Split/FP/03/diff.txt", "3,x", "diff.txt: line 1 has 'x'"),
        ("Split/FP/03/diff.txt", "3,99", "diff.txt: line 1 names the images 3 and 99"),
        ("Split/FP/03/diff.txt", None, "diff.txt: No such file"),
        ("Pair_list_F.txt", None, "Pair_list_F.txt: No such file"),
        ("../Data/profile/5.jpg", None, r"04/diff.txt: line 1 names an image that cannot be read"),
    ],
)
def test_cfp_faults_name_the_line(tmp_path, file, text, message):
    protocol = cfp(tmp_path / "cfp")
    if text is None:
        (protocol / file).unlink()
    else:
        (protocol / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read_pair_list("cfp_fp", protocol / "Pair_list_F.txt", tmp_path / "cfp")
