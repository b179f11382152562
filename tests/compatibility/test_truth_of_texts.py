"""Hints are commands that work where they are given."""

from pathlib import Path

import pytest
from cases import case

from vitface.__main__ import main
from vitface.evaluation.benchmarks import next_command

KIND = "Truth of texts and numbers"
RUN = Path("runs/a")


@pytest.mark.parametrize(
    ("folder", "train_data", "hint"),
    [
        pytest.param(
            None,
            "faces",
            "vitface info runs/a",
            marks=case("a run where no benchmark is", "the hint is `vitface info`"),
        ),
        pytest.param("empty", "synthetic", "vitface evaluate --checkpoint runs/a --bench synthetic"),
        pytest.param(
            "bench",
            "faces",
            "vitface evaluate --checkpoint runs/a --bench all --data-dir bench",
            marks=case("benchmarks in another folder than `data`", "the hint names the folder"),
        ),
        pytest.param("data", "faces", "vitface evaluate --checkpoint runs/a --bench all"),
    ],
)
def test_the_hint_after_a_run(folder, train_data, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bench", "data"):
        Path(name).mkdir()
        Path(name, "lfw.bin").touch()
    assert next_command(RUN, folder, train_data) == hint


@case("`vitface data draw faces --people 2 --images 3`", "its hint has the batch size that six images fill")
def test_the_hint_of_data_draw(tmp_path, capsys):
    main(["data", "draw", str(tmp_path / "faces"), "--people", "2", "--images", "3"])
    assert capsys.readouterr().out.endswith("--image-size 112 --holdout-people 0 --batch-size 6\n")
