"""benchmarks/time_to_accuracy.py: what it makes of the curves, and a run of both sides on a few drawn faces."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import time_to_accuracy  # noqa: E402


def test_the_ratio_is_the_time_to_the_peers_last_accuracy():
    peer = [[10.0, 0.80], [20.0, 0.90], [40.0, 0.88]]
    ours = [[5.0, 0.70], [12.0, 0.88], [30.0, 0.91], [50.0, 0.93]]
    found = time_to_accuracy.result(peer, ours)
    assert found["ratio_to_peer_accuracy"] == 0.3  # 12 s of 40
    assert found["accuracy_at_equal_time"] == 0.91
    assert time_to_accuracy.result(peer, ours[:1])["ratio_to_peer_accuracy"] is None
    assert time_to_accuracy.result([[1.0, 0.5]], ours)["accuracy_at_equal_time"] == 0.0
    medians = time_to_accuracy.median_curve([[[1, 0.1], [2, 0.4]], [[3, 0.3], [6, 0.5]], [[2, 0.2], [4, 0.9]]])
    assert medians == [[2, 0.2], [4, 0.5]]


def test_the_drawing_holds_both_curves(tmp_path):
    time_to_accuracy.draw(tmp_path / "c.svg", {"peer": [[1.0, 0.5], [2.0, 0.6]], "vitface": [[1.0, 0.7], [3.0, 0.9]]})
    drawn = (tmp_path / "c.svg").read_text()
    assert drawn.count("<polyline") == 2 and drawn.count("<circle") == 4
    assert ">vitface: the ends of several runs</text>" in drawn and ">peer: in the course of one run</text>" in drawn


def test_a_failing_side_ends_it_with_its_output():
    with pytest.raises(RuntimeError, match="(?s)failed.*no such peer"):
        time_to_accuracy.curve_of([sys.executable, "-c", "raise SystemExit('no such peer')"], 1)
    said = [sys.executable, "-c", "print('epoch 1'); print('{\"curve\": [[1.5, 0.9]]}')"]
    assert time_to_accuracy.curve_of(said, 1) == [[1.5, 0.9]]


def test_runs_without_an_epoch_are_refused_before_the_peer_trains(tmp_path, capsys):
    (tmp_path / "peer.py").write_text("raise SystemExit('trained')")
    command = ["--peer", str(tmp_path / "peer.py"), "--data", str(tmp_path), "--epochs", "8", "0"]
    with pytest.raises(SystemExit) as ended:
        time_to_accuracy.main(command)
    assert ended.value.code == 2 and "--epochs: must be at least 1, not 0" in capsys.readouterr().err
