"""Benchmarks under names that are nearly the published ones, for training, evaluation and `data check` alike."""

import numpy as np
import pytest
from cases import case
from drawn import drawn_faces, jpeg

from vitface.__main__ import main
from vitface.config import TrainConfig
from vitface.data.checks.check_pairs import check_benchmark, scan_benchmark
from vitface.data.checks.doctor import check
from vitface.data.formats import published
from vitface.data.formats.pairs import VerificationSet, write_bin
from vitface.errors import DataError
from vitface.evaluation.benchmarks import available, read_benchmark
from vitface.training.setup import final_benchmarks

KIND = "Names of benchmarks"
PICTURES = [jpeg(crop) for crop in drawn_faces(people=4, images=2)]
FROZEN = ["evaluate", "--backbone", "vit_nano", "--weights", "random", "--image-size", "112"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Benchmarks of four pairs."""
    for name in published.PAIRS:
        monkeypatch.setitem(published.PAIRS, name, 4)


def bin_file(path, pairs=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bin(path, PICTURES[: 2 * pairs], [True, False] * (pairs // 2))


def crops(folder, listed):
    """Crops of four people, and a list of two folds of them."""
    for number, picture in enumerate(PICTURES):
        who = f"P{number // 2}"
        (folder / who).mkdir(parents=True, exist_ok=True)
        (folder / who / f"{who}_{number % 2 + 1:04d}.jpg").write_bytes(picture)
    lines = ["2\t1", "P0\t1\t2", "P0\t1\tP1\t1", "P2\t1\t2", "P2\t1\tP3\t1"]
    (folder / listed).write_text("\n".join(lines))


def formats(folder):
    return {report.path.removeprefix(f"{folder}/"): report.format for report in check(folder, [], 0)}


@pytest.mark.parametrize(
    ("file", "name"),
    [
        pytest.param("LFW.bin", "lfw", marks=case("`LFW.bin`", "is `lfw.bin`")),
        pytest.param("agedb-30.bin", "agedb_30", marks=case("`agedb-30.bin`", "is `agedb_30.bin`")),
        pytest.param("agedb30.bin", "agedb_30", marks=case("`agedb30.bin`", "is `agedb_30.bin`")),
        pytest.param("CFP-FP.BIN", "cfp_fp", marks=case("`CFP-FP.BIN`", "is `cfp_fp.bin`")),
        pytest.param(
            "calfw (1).bin", "calfw", marks=case("`calfw (1).bin`, a browser's second copy", "is `calfw.bin`")
        ),
    ],
)
def test_files(tmp_path, file, name):
    bin_file(tmp_path / file)
    assert available(tmp_path) == [name] and formats(tmp_path) == {file: "verification set"}
    assert published.bin_in(tmp_path, name) == tmp_path / file
    bin_file(tmp_path / f"{name}.bin")
    assert published.bin_in(tmp_path, name) == tmp_path / f"{name}.bin"  # the published name counts first


@pytest.mark.parametrize(
    ("folder", "listed"),
    [
        pytest.param("LFW", "pairs.txt", marks=case("`LFW/pairs.txt`", "is `lfw/pairs.txt`")),
        pytest.param("lfw-aligned", "pairs.txt", marks=case("`lfw-aligned/pairs.txt`", "is `lfw/pairs.txt`")),
        pytest.param("lfw", "PAIRS.TXT", marks=case("`PAIRS.TXT`", "is `pairs.txt`")),
        pytest.param("lfw", "pairs (1).txt", marks=case("`pairs (1).txt`", "is `pairs.txt`")),
    ],
)
def test_folders(tmp_path, folder, listed):
    crops(tmp_path / folder, listed)
    assert available(tmp_path) == ["lfw"] and formats(tmp_path) == {f"{folder}/{listed} (lfw)": "verification set"}
    assert published.find_list(tmp_path, "lfw") == (tmp_path / folder / listed, tmp_path / folder)
    assert formats(tmp_path / folder) == {f"{listed} (lfw)": "verification set"}
    (report,) = check(tmp_path / folder / listed, [], 0)
    assert report.counts["pairs"] == 4 and not [x for x in report.findings if x.name == "not_evaluated"]


@case("`pairs.csv` beside crops", "no training set; an error with the command that makes pairs.txt")
def test_a_table_beside_crops(tmp_path, capsys):
    crops(tmp_path / "lfw", "pairs.csv")
    (tmp_path / "lfw" / "pairs.csv").write_text("name,imagenum1,imagenum2\nP0,1,2\n")
    assert main(["data", "check", str(tmp_path), "--num-workers", "0"]) == 1
    file = tmp_path / "lfw" / "pairs.csv"
    out = capsys.readouterr().out
    assert (
        f"sed '1s/.*/10 300/; s/,/\\t/g' {file} > {file.with_suffix('.txt')}" in out and "folder per person" not in out
    )
    with pytest.raises(DataError, match="head of a table"):
        read_benchmark("lfw", tmp_path)


@case(
    "crops with `pairs.txt` in a folder of another name",
    "checked as test set; a note says that evaluation passes it by",
)
def test_a_test_set_in_a_folder_of_another_name(tmp_path):
    crops(tmp_path / "data" / "faces", "pairs.txt")
    (report,) = check(tmp_path / "data", [], 0)
    assert report.format == "verification set" and available(tmp_path / "data") == []
    assert "do not look for a folder faces" in report.findings[-1].what


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        pytest.param(
            "lfw.bin", "lfw.bin", "lfw.bin is a file and no folder of benchmarks; name its folder: {0}\n",
            marks=case("`--data-dir data/lfw.bin`", "error: name the folder"),
        ),
        pytest.param(
            "lfw112.bin", ".", "mv {0}/lfw112.bin {0}/lfw.bin\n",
            marks=case("`lfw112.bin`", "error: the command that renames it")
        ),
        pytest.param(
            "lfw.bin/lfw.bin", ".",
            "lfw.bin is a folder: mv {0}/lfw.bin {0}/lfw.bin-folder && mv {0}/lfw.bin-folder/lfw.bin {0}/lfw.bin\n",
            marks=case("`lfw.bin/lfw.bin`, as some archives unpack", "error: the command"),
        ),
    ],
)  # fmt: skip
def test_the_error_says_what_to_type(tmp_path, capsys, made, asked, message):
    bin_file(tmp_path / made)
    assert main([*FROZEN, "--bench", "lfw", "--data-dir", str(tmp_path / asked)]) == 2
    assert message.format(tmp_path) in capsys.readouterr().err


@case("`--data-dir data/lfw` where the list lies in it", "error: name the folder above")
def test_the_folder_of_a_list_is_not_the_data_folder(tmp_path, capsys):
    crops(tmp_path / "lfw", "pairs.txt")
    assert main([*FROZEN, "--bench", "lfw", "--data-dir", str(tmp_path / "lfw")]) == 2
    assert f"is a benchmark's folder; name the one it is in: {tmp_path}\n" in capsys.readouterr().err


@case("`--val-data data/lfw.bin`", "error: name the folder")
def test_val_data_is_a_file(tmp_path):
    bin_file(tmp_path / "lfw.bin")
    with pytest.raises(ValueError, match=rf"lfw.bin is no folder; name its folder, {tmp_path}$"):
        final_benchmarks(TrainConfig(val_data=str(tmp_path / "lfw.bin")))


@case("`lfw.bin` of two pairs in `data check`", "an error, as training and evaluation will say")
def test_the_doctor_says_what_evaluation_will_say(tmp_path, capsys):
    bin_file(tmp_path / "lfw.bin", pairs=2)
    with pytest.raises(DataError, match=r"lfw has 2 pairs, the published set has \d") as said:
        read_benchmark("lfw", tmp_path)
    assert main(["data", "check", str(tmp_path), "--num-workers", "0"]) == 1
    assert f"ERROR not_published: {str(said.value).partition(': ')[2]}".replace("6000", "4") in capsys.readouterr().out


@case("a .bin that is named like no benchmark", "checked; a note says how it is evaluated")
def test_a_set_of_ones_own(tmp_path, capsys):
    bin_file(tmp_path / "mine.bin", pairs=2)
    assert main(["data", "check", str(tmp_path), "--num-workers", "0"]) == 0
    assert (
        "do not look for mine.bin; evaluate --bench FILE takes it\n    the names they know: lfw,"
        in capsys.readouterr().out
    )


@case("a training folder of one person in `data check`", "an error: nothing can be trained on it")
def test_one_person(tmp_path, capsys):
    (tmp_path / "people" / "anna").mkdir(parents=True)
    for number in range(2):
        (tmp_path / "people" / "anna" / f"{number}.jpg").write_bytes(PICTURES[number])
    assert main(["data", "check", str(tmp_path / "people"), "--num-workers", "0"]) == 1
    assert "ERROR one_person: one person only, 'anna'" in capsys.readouterr().out


BLANK, DAMAGED = jpeg(np.zeros((112, 112, 3), np.uint8)), b"\xff\xd8\xff damaged"


@pytest.mark.parametrize("bad", [BLANK, DAMAGED])
@case("a blank or damaged image in several pairs", "no contradiction, no copy: it shows nobody")
def test_images_that_show_nothing_are_not_equal(bad):
    pairs = [
        PICTURES[0],
        bad,
        bad,
        PICTURES[2],
        PICTURES[0],
        PICTURES[2],
        bad,
        bad,
        PICTURES[4],
        bad + b" ",
        PICTURES[6],
        bad,
    ]
    data = scan_benchmark(VerificationSet("mine", pairs, np.array([1, 1, 0, 0, 1, 0], bool)), 0)
    assert {finding.name for finding in check_benchmark(data)} <= {"damaged", "flat"}
