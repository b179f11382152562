"""Pairs of one's own, in a list or a .bin, and sets that not everybody has: what evaluation makes of them."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from cases import case
from drawn import drawn_faces, jpeg

import vitface
from vitface.__main__ import main
from vitface.data.formats import published
from vitface.data.formats.pair_lists import read_own_list
from vitface.data.formats.pairs import VerificationSet, write_bin
from vitface.data.images import decode_image
from vitface.errors import DataError
from vitface.evaluation import benchmarks
from vitface.evaluation.alarms import pair_alarms, share_alarms
from vitface.evaluation.benchmarks import Benchmark, evaluate_all, read_benchmark
from vitface.evaluation.protocol import verify, verify_fixed
from vitface.evaluation.report import (
    notes,
    quality_lines,
    quality_of,
    results_json,
    results_table,
    rfw_spread,
)
from vitface.evaluation.scores import SCORES, load_scores
from vitface.evaluation.statistics import accuracy_interval

KIND = "Own pairs"
PICTURES = [jpeg(crop) for crop in drawn_faces(people=40, images=8)]
FROZEN = ["evaluate", "--backbone", "vit_nano", "--weights", "random", "--image-size", "112", "--device", "cpu"]


def pairs_of(count, seed=0):
    """`count` distinct pairs of the drawn people, half of them same, mixed: (index of a picture, another's, same)."""
    rng, rows = np.random.default_rng(seed), {}
    while len(rows) < count:
        person, same = rng.integers(40), len(rows) % 2 == 0
        other = person if same else (person + rng.integers(1, 40)) % 40
        rows[8 * person + rng.integers(4), 8 * other + 4 + rng.integers(4), same] = None
    return [*rows]


def embed(crops):
    """Pixels, whose similarity tells the drawn people apart in most cases."""
    rows = crops[:, ::8, ::8].reshape(len(crops), -1).astype("f4")
    rows -= rows.mean(axis=1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write_list(folder, rows, text="{a},{b},{same:d}", header="", name="pairs.csv"):
    """A list, and crops a folder below it."""
    (folder / "crops").mkdir(parents=True, exist_ok=True)
    lines, home = [header] if header else [], folder.absolute()
    for number, (a, b, same) in enumerate(rows):
        for i in (a, b):
            (folder / "crops" / f"{i}.jpg").write_bytes(PICTURES[i])
        more = dict(fold=number % 2, id=number, word="same" if same else "different", home=home)
        lines.append(text.format(a=f"crops/{a}.jpg", b=f"crops/{b}.jpg", same=same, **more))
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def write_set(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bin(path, [PICTURES[i] for a, b, _ in rows for i in (a, b)], [same for *_, same in rows])


ROWS = pairs_of(200)


@pytest.mark.parametrize(
    ("text", "header", "folds"),
    [
        pytest.param("{a},{b},{same:d}", "", False, marks=case("`a.jpg,b.jpg,1`", "read, ten contiguous folds")),
        pytest.param("{a}\t{b}\t{same:d}", "", False, marks=case("the same with tabs", "read")),
        pytest.param("{same} {a} {b}", "", False, marks=case("`True a.jpg b.jpg`", "read")),
        pytest.param("{a};{b};{same:d};{fold}", "", True, marks=case("`a.jpg;b.jpg;1;0`", "the last is the fold")),
        pytest.param("{a} {b} {same:d} {fold}", "", True, marks=case("the same with spaces", "read")),
        pytest.param(
            '{id},{fold},{same:d},"{a}","{b}",x', "id,fold,label,path1,path2,note", True,
            marks=case("a table with a header, in any order, quoted, with more columns", "read by its column names"),
        ),
        pytest.param("{a},{b},{same:d}", "img1,img2,is_same", False, marks=case("`img1,img2,is_same` on top", "read")),
        pytest.param("{a},{b},{same:d}", "left,right,target", False, marks=case("`left,right,target` on top", "read")),
        pytest.param("{a},{b},{same:d}", "left,right,is_similar", False),
        pytest.param("{a},{b},{same:d}", "0,1,2", False, marks=case("pandas' `0,1,2` on top", "read by their places")),
        pytest.param(
            "{a},{b},0,{same:d}", "name1,name2,same_camera,label", False,
            marks=case("`name1,name2,same_camera,label` on top", "the column `label` is taken, as a whole name"),
        ),
        pytest.param("{a},{b},{same:d}", "Image A,image-b,Same_Person", False),
        pytest.param(
            "{a} {b} {fold} {same:d}", "path1 path2 fold label", True,
            marks=case("`path1 path2 fold label` on top, all with spaces", "read by its column names"),
        ),
        pytest.param("{a},{b},{same:d},,", "", False, marks=case("empty cells behind", "read")),
        pytest.param("{a},{b},{word}", "", False, marks=case("`same` and `different` for 1 and 0", "read")),
        pytest.param(
            "{home}/{a},{home}/{b},{same:d}", "", False, marks=case("absolute paths into the list's folder", "read"),
        ),
    ],
)  # fmt: skip
def test_lists(tmp_path, text, header, folds):
    found = read_own_list(write_list(tmp_path, ROWS[:6], text, header))
    assert found.issame.tolist() == [True, False] * 3
    assert found.images == [PICTURES[i] for a, b, _ in ROWS[:6] for i in (a, b)]
    assert (found.folds.tolist() == [0, 1] * 3) if folds else found.folds is None


@case("folds numbered 5 and 7", "folds 0 and 1")
def test_numbers_of_folds(tmp_path):
    file = write_list(tmp_path, ROWS[:4], "{a},{b},{same:d},5")
    file.write_text(file.read_text().replace(",1,5", ",1,7"))
    assert read_own_list(file).folds.tolist() == [1, 0, 1, 0]


@case("a list of one's own in LFW's form", "read, with its folds")
def test_lfw_form(tmp_path):
    for who in "AB":
        (tmp_path / who).mkdir()
        for i in (1, 2):
            (tmp_path / who / f"{who}_{i:04d}.jpg").write_bytes(PICTURES[i])
    (tmp_path / "mine.txt").write_text("2 1\n" + 2 * "A 1 2\nA 1 B 2\n")
    assert read_own_list(tmp_path / "mine.txt").folds.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            "{c},{c},1,1\n{c},{c},0\n", "line 2 has no fold, unlike the first pair",
            marks=case("a fold in some lines", "error: the line"),
        ),
        pytest.param(
            "3,{c},{c},1\n", "line 1 is not `label path path`.* lines are `path path label`.*`path path label fold`",
            marks=case("numbers on both sides, without a header", "error: which is the label?"),
        ),
        pytest.param(
            "{c},{c},1\n{c},{c},2\n", "line 2 is not", marks=case("the label 2", "error: the line"),
        ),
        pytest.param(
            "{c},{c},maybe\n{c},{c},0\n", "line 1 is not", marks=case("the label `maybe`", "the same"),
        ),
        pytest.param(
            "crops/1,crops/2,1\n", "line 1 is not .* with its .jpg", marks=case("paths without .jpg", "the same"),
        ),
        pytest.param(
            "path1,path2,a,b,c\n{c},{c},1,2,3\n", "line 1 should name two columns `path...`, one `label`",
            marks=case("a table without a column `label`", "error: the names it should have"),
        ),
        pytest.param(
            "path1,path2,same_camera\n{c},{c},1\n", "csv: line 1 should name .*a'; understood are path, .* is_same",
            marks=case("`path1,path2,same_camera` on top", "error: the names that are understood"),
        ),
        pytest.param("probe,reference,camera\n{c},{c},1\n", "line 1 is not .* a header is `path1,path2,label`"),
        pytest.param(
            "fold,path1,path2,label\n1,{c},{c},\n", "line 2 is not",
            marks=case("a line whose label is empty, in a table with folds", "error: the line"),
        ),
        pytest.param("path,path,label\n", "line 1 is not", marks=case("no pair", "error: the line")),
        pytest.param(
            "crops/no.jpg,{c},1\n", "line 1 names an image that cannot be read: .*no.jpg: No such file",
            marks=case("a photo that is not there", "error: the line"),
        ),
        pytest.param(
            "/etc/x.jpg,{c},1\n", "line 1 names '/etc/x.jpg', which is outside .*: put the list into a folder above",
            marks=case("a photo outside the list's folder", "error: the line"),
        ),
        pytest.param("{c},{c},1,1\n{c},{c},0,1\n", "one fold", marks=case("one fold for all pairs", "error")),
    ],
)  # fmt: skip
def test_mistakes_in_lists(tmp_path, text, message):
    file = write_list(tmp_path, ROWS[:1])
    file.write_text(text.replace("{c}", f"crops/{ROWS[0][0]}.jpg"))
    with pytest.raises(DataError, match=message):
        read_own_list(file)


@case(
    "`path1,path2,mismatch` on top, or `not_same`, `different`, `distance`",
    "error: 1 means different people there",
)
@pytest.mark.parametrize("name", ["mismatch", "not_same", "different", "distance", "Non-Match", "is_different"])
def test_columns_of_the_opposite_meaning(tmp_path, name):
    for text, mark in (("{a},{b},{same:d}", ","), ("{a} {b} {same:d}", " ")):
        file = write_list(tmp_path, ROWS[:2], text, mark.join(["path1", "path2", name]))
        with pytest.raises(DataError, match=f"csv: line 1 has the column '{name}': 1 means different people there"):
            read_own_list(file)


@case("`--bench photo.jpg`", "error: what it is")
def test_no_list(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PICTURES[0])
    with pytest.raises(DataError, match="a.jpg is no pair list but one JPEG image"):
        read_own_list(tmp_path / "a.jpg")


@case("Excel's `Unicode text`: tabs, UTF-16", "read")
def test_utf_16(tmp_path):
    file = write_list(tmp_path, ROWS[:4], "{a}\t{b}\t{same:d}")
    file.write_text(file.read_text(), "utf-16")
    assert read_own_list(file).issame.tolist() == [True, False] * 2


@case("a pair listed twice", "an alarm: it counts twice")
def test_a_pair_again(tmp_path):
    file = write_list(tmp_path, [*ROWS[:4], (*ROWS[1][1::-1], False)])
    found = pair_alarms("pairs.csv", read_own_list(file))
    assert found == ["pairs.csv: 1 pairs are listed again, and count again"]


@case("40 folds", "error: at most 32")
def test_too_many_folds():
    images = PICTURES[:80]
    with pytest.raises(DataError, match="mine: 40 folds, at most 32"):
        VerificationSet("mine", images, np.arange(40) % 2 == 0, np.arange(40))


@case("`--bench FILE`: 200 pairs in a list, or in a .bin", "the protocol's ten folds; marked as no published set")
def test_the_protocol(tmp_path):
    write_list(tmp_path, ROWS)
    write_set(tmp_path / "mine.bin", ROWS)
    found = evaluate_all(embed, ["pairs.csv", "mine.bin"], tmp_path)
    assert found.alarms == [] and found.failures == []
    listed, packed = found.results.values()
    first, second = (embed(np.stack([decode_image(PICTURES[row[k]], "") for row in ROWS])) for k in (0, 1))
    issame = np.array([same for *_, same in ROWS])
    expected = verify(np.square(first.astype("f8") - second).sum(axis=1), issame)
    assert listed.accuracy == packed.accuracy == pytest.approx(expected.accuracy, abs=1e-9) and listed.in_folds
    assert listed.accuracy > 0.75 and listed.auc == packed.auc
    np.testing.assert_array_equal(listed.folds, np.repeat(np.arange(10), 20))
    table = results_table(found.results)
    assert f"{100 * listed.accuracy:.2f} ± {100 * listed.std:.2f}" in table and "own pairs" in table
    assert notes(found.results)[0] == ("pairs.csv is no published set: 10 folds; TAR needs 3,000 different pairs")
    assert [entry["published"] for entry in results_json(found.results).values()] == [False, False]


@case("40 pairs, a run with thresholds", "decided by the run's calibrated threshold; kept for --compare")
def test_few_pairs_with_a_threshold(tmp_path, tiny_run, capsys):
    file = write_list(tmp_path / "some where", ROWS[:40])
    command = ["evaluate", "--checkpoint", str(tiny_run), "--device", "cpu", "--bench", str(file)]
    assert main([*command, "--json", str(tmp_path / "out.json"), "--output", str(tmp_path / "out.html")]) == 0
    out = capsys.readouterr().out
    entry = json.loads((tmp_path / "out.json").read_text())["benchmarks"]["pairs.csv"]
    model = vitface.load(tiny_run)
    rows = model.embed([PICTURES[i] for a, b, _ in ROWS[:40] for i in (a, b)]).astype("f8")
    right = ((rows[::2] * rows[1::2]).sum(axis=1) >= 0.6) == [same for *_, same in ROWS[:40]]
    assert entry["accuracy"] == right.mean() and entry["std"] is None and entry["threshold"] == pytest.approx(0.6)
    assert "decided by the model's calibrated threshold, 0.6000" in out and "± " not in out.splitlines()[1]
    page = (tmp_path / "out.html").read_text()
    assert "no published set" in page and f"<td>{100 * right.mean():.2f}</td>" in page
    kept = load_scores(tiny_run / SCORES)[0]["pairs.csv"]
    assert kept.accuracy == entry["accuracy"] and not kept.in_folds
    assert main([*command, "--dry-run"]) == 0
    assert "images of pairs.csv: about" in capsys.readouterr().out


@case("40 pairs, a model without thresholds", "AUC, EER and TAR only")
def test_few_pairs_without_a_threshold(tmp_path, capsys):
    file = write_list(tmp_path, ROWS[:40])
    for _ in range(2):  # evaluated, then kept
        assert main([*FROZEN, "--bench", str(file), "--json", str(tmp_path / "out.json")]) == 0
        entry = json.loads((tmp_path / "out.json").read_text())["benchmarks"]["pairs.csv"]
        assert entry["accuracy"] is entry["interval"] is entry["threshold"] is None and 0 < entry["auc"] < 1
        assert "AUC and EER are all there is" in capsys.readouterr().out
    file.write_text("\n".join(file.read_text().splitlines()[:2]))
    assert main([*FROZEN, "--bench", str(file), "--output", str(tmp_path / "out.html"), "--show-faces"]) == 0
    page = (tmp_path / "out.html").read_text()
    assert "no threshold" in page and "Beside what others report" not in page
    hardest = page.split("Hardest pairs")[1].split("</section>")[0]
    assert hardest.count("<figure") == 2 == hardest.count("<img") / 2  # a pair is one figure


@case("a list of two pairs", "evaluated")
def test_two_pairs(tmp_path):
    write_list(tmp_path, ROWS[:2])
    found = evaluate_all(embed, ["pairs.csv"], tmp_path, threshold=0.5)
    assert found.failures == [] and found.results["pairs.csv"].accuracy in (0, 0.5, 1)


def test_the_interval_of_one_threshold_is_wilsons():
    """Of 9 in 10: 59.58 to 98.21, from Wilson's formula as R's prop.test has it."""
    distance, issame = np.array([0.5] * 5 + [1.5] * 4 + [0.5]), np.repeat([True, False], 5)
    one = verify_fixed(distance, issame, 1.0)
    assert one.accuracy == 0.9
    assert accuracy_interval(one) == pytest.approx((0.59585, 0.98213), abs=1e-5)
    assert math.isnan(verify_fixed(distance, issame, np.nan).accuracy)


@pytest.mark.parametrize(
    ("name", "issame", "expected"),
    [
        pytest.param(
            "pairs.csv", np.arange(400) < 200, "100% of fold 1 are same pairs, of all 50%: mix the lines",
            marks=case("a list of one's own, sorted by label", "an alarm: mix the lines, or give folds"),
        ),
        pytest.param(
            "pairs.csv", np.arange(400) % 10 == 0, "90% are different pairs, so that calling all so is right as often",
            marks=case("one same pair in ten", "an alarm: the accuracy says little"),
        ),
        ("lfw", np.arange(400) < 200, "100% of fold 1 are same pairs: the pairs were put in another order"),
        ("pairs.csv", np.arange(40) < 20, None),
    ],
)  # fmt: skip
def test_alarms(name, issame, expected):
    found = list(share_alarms(name, np.repeat(np.arange(10), len(issame) // 10), issame))
    assert (len(found) == 1 and expected in found[0]) if expected else found == []


@case("`data/mine.bin` with `--bench all`", "named, with the command that evaluates it")
def test_bins_that_are_no_benchmark(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(published.PAIRS, "lfw", 20)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "lfw", Benchmark("general", 20))
    for name in ("lfw", "mine"):
        write_set(tmp_path / f"{name}.bin", ROWS[:20])
    assert main([*FROZEN, "--bench", "all", "--data-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"not evaluated, as no benchmark is called so: vitface evaluate --bench {tmp_path}/mine.bin" in out
    assert "\nlfw " in out and "\nmine" not in out


@pytest.mark.parametrize(
    ("made", "file", "expected"),
    [
        pytest.param(("lfw.bin",), "lfw.bin", "lfw", marks=case("`--bench data/lfw.bin`", "LFW, with its checks")),
        pytest.param(
            ("lfw.bin", "lfw (1).bin"), "lfw (1).bin", "lfw--1-.bin", marks=case("`lfw (1).bin` beside it", "one's own")
        ),
        (("African_test.bin",), "African_test.bin", "rfw_african"),
        (("vggface2_fp.bin",), "vggface2_fp.bin", "vgg2_fp"),
        (("mine.csv",), "mine.csv", "mine.csv"),
    ],
)
def test_the_name_of_a_file(tmp_path, made, file, expected):
    for name in made:
        (tmp_path / name).write_bytes(b"?")
    assert published.named_by(tmp_path / file) == (expected, tmp_path)
    shutil.copytree(tmp_path, tmp_path / "lfw")
    (tmp_path / "lfw" / "pairs.txt").write_text("")
    assert published.named_by(tmp_path / "lfw" / "pairs.txt") == ("lfw", tmp_path)


@case("RFW's four .bin files", "each by the protocol, and the spread between the groups in a line of its own")
def test_rfw(tmp_path, monkeypatch):
    for seed, (name, group) in enumerate(published.RFW.items()):
        monkeypatch.setitem(published.PAIRS, name, 200)
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, Benchmark("ethnicity", 200))
        rows = [(a, b, same != (number < 4 * seed)) for number, (a, b, same) in enumerate(pairs_of(200, seed))]
        write_set(tmp_path / "RFW_test" / f"{group.title()}_test.bin", rows)
    names = benchmarks.available(tmp_path)
    assert names == ["rfw_african", "rfw_asian", "rfw_caucasian", "rfw_indian"]
    results = evaluate_all(embed, names, tmp_path).results
    accuracies = np.array([results[name].accuracy for name in names])
    spread = rfw_spread(results)
    assert spread["spread"] == accuracies.max() - accuracies.min() > 0
    assert spread["skewed_error_ratio"] == (1 - accuracies.min()) / (1 - accuracies.max())
    assert spread["average"] == pytest.approx(accuracies.mean()) and spread["std"] == accuracies.std()
    line = results_table(results).splitlines()[-1].strip()
    best, worst = (names[pick(accuracies)].removeprefix("rfw_") for pick in (np.argmax, np.argmin))
    assert line.startswith(f"spread of RFW      {100 * np.ptp(accuracies):.2f} points, {best} to {worst}; deviation ")
    del results["rfw_asian"]
    assert rfw_spread(results) is None and "no spread of RFW: rfw_asian is missing" in results_table(results)


@case("XQLFW as its release unpacks: list and `xqlfw_aligned_112/`", "read, with its folds and people")
def test_xqlfw(tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks.BENCHMARKS, "xqlfw", Benchmark("quality", 4))
    crops = tmp_path / "xqlfw" / "xqlfw_aligned_112"
    for number, who in enumerate(["Al_A", "Bo_B"]):
        (crops / who).mkdir(parents=True)
        for i in (1, 2):
            (crops / who / f"{who}_{i:04d}.jpg").write_bytes(PICTURES[8 * number + i])
    (tmp_path / "xqlfw" / "xqlfw_pairs.txt").write_text("2\t1\n" + 2 * "Al_A\t1\t2\nAl_A\t1\tBo_B\t2\n")
    assert benchmarks.available(tmp_path) == ["xqlfw"]
    found = read_benchmark("xqlfw", tmp_path)
    assert found.folds.tolist() == [0, 0, 1, 1] and found.people.tolist() == [[0, 0], [0, 1]] * 2
    assert found.images[:4] == [PICTURES[i] for i in (1, 2, 1, 10)]
    assert quality_of({"xqlfw": None}, tmp_path) == []
    scores = tmp_path / "xqlfw" / "xqlfw_scores.txt"
    scores.write_text("ID\tNum\tScore\nAl_A\t1\t0.9\nAl_A\t2\t0.25\nBo_B\t2\t1.0\n")
    np.testing.assert_array_equal(published.pair_quality(tmp_path), [[0.9, 0.25], [0.9, 1.0]] * 2)
    result = SimpleNamespace(correct=np.array([True, True, False, True]))
    low, middle, high = groups = quality_of({"xqlfw": result}, tmp_path)
    assert low == {"quality": [0.25, 0.25], "pairs": 2, "accuracy": 0.5} and middle["pairs"] == high["pairs"] == 1
    assert quality_lines(groups)[0].endswith("50.00 at 0.25 to 0.25, 100.00 at 0.90 to 0.90, 100.00 at 0.90 to 0.90")
    scores.write_text("ID\tNum\tScore\nAl_A\t1\t2\n")
    with pytest.raises(DataError, match="line 2 is not `ID Num Score`"):
        published.pair_quality(tmp_path)
    scores.write_text("ID\tNum\tScore\nAl_A\t1\t0.2\n")
    with pytest.raises(DataError, match="has no score of Al_A/Al_A_0002.jpg, which xqlfw_pairs.txt names"):
        published.pair_quality(tmp_path)
    assert main(["data", "check", str(tmp_path / "xqlfw"), "--num-workers", "0"]) == 1  # four pairs are not XQLFW
