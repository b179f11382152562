"""The table of recorded experiments, from runs that are there."""

import dataclasses
import json

import numpy as np

import vitface.__main__
from vitface.commands.experiments import RECORDED, RECORDED_ON, experiments_markdown
from vitface.config import resolve
from vitface.evaluation.protocol import verify
from vitface.evaluation.scores import SCORES, save_scores
from vitface.presets import EXPERIMENTS
from vitface.store.faces import open_checkpoint


def rows(text):
    """{(experiment, run): the other cells}"""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return {tuple(cells[:2]): cells[2:] for cells in lines[2:]}


def test_without_runs_it_says_so(tmp_path):
    table = rows(experiments_markdown(tmp_path))
    names = [name for name in EXPERIMENTS if name.startswith("exp_")]
    assert {name for name, run in table if run == "not run"} == set(names)
    assert {name for name, run in table if run == "recorded"} == set(RECORDED)
    assert table["exp_001", "recorded"] == ["865,664", "90.45", "71.81", "52.30", "69.27", "68.67", ""]
    assert all(set(cells) == {""} for (_, run), cells in table.items() if run == "not run")


def test_a_run_shows_what_it_scored_and_how_it_differs(tmp_path, tiny_run, capsys):
    settings = dataclasses.asdict(resolve({"exp": "exp_003", "epochs": 2, "save_dir": str(tiny_run)}))
    (tiny_run / "config.json").write_text(json.dumps({**settings, "dtype": "bf16", "device": "cpu"}))
    unfinished = tmp_path / "runs" / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text(json.dumps(dataclasses.asdict(resolve({"exp": "exp_002"}))))
    issame = np.arange(200) % 2 == 0
    distance = np.where(issame, 0.5, 1.5)
    distance[:20] = 1.2  # the ten same pairs of the first two folds are taken for different ones
    save_scores(tiny_run / SCORES, {"lfw": verify(distance, issame)}, open_checkpoint(tiny_run).sha256)
    docs = tmp_path / "results.md"
    assert vitface.__main__.main(["experiments", "--runs", str(tiny_run.parent), "--docs", str(docs)]) == 0
    printed = capsys.readouterr().out
    table = rows(printed)
    assert ("exp_003", "not run") not in table and ("exp_001", "not run") in table
    trained = 2 * 3 * 4 * (16 + 48 + 16 + 16) + 16 * 256 + 256 + 256 * 3 + 3 + 16 * 8 + 8 + 16
    scored = f"{100 * verify(distance, issame).accuracy:.2f} ± {100 * verify(distance, issame).std:.2f}"
    others = ["not evaluated"] * (len(RECORDED_ON) - 1)
    assert table["exp_003", "tiny"] == [f"{trained:,}", scored, *others, "`--epochs 2`"]
    assert table["exp_002", "unfinished"] == ["", "not evaluated", *others, ""]
    assert printed in docs.read_text() and "## The recorded experiments" in docs.read_text()
