"""A run's own files, damaged or of a stranger: scores, logs, settings, counters. Named, or left out with a note."""

import dataclasses
import json
import os
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tiny import settings, use_tiny

from vitface.__main__ import main
from vitface.config import resolve
from vitface.errors import CheckpointError
from vitface.evaluation import benchmarks
from vitface.evaluation.benchmarks import Benchmark
from vitface.evaluation.protocol import verify
from vitface.evaluation.scores import SCORES, keep_scores, load_scores, save_scores
from vitface.files import json_bytes, sha256_bytes
from vitface.store.settings import read_config, read_epochs
from vitface.training.run import run
from vitface.training.runs.checkpoint import load_state

STEM = f"lfw/{'a' * 64}"
SAME = np.arange(40) % 2 == 0


def scores(**changes):
    """The tensors of 40 pairs; a change of None leaves one out, names without a stem get one."""
    tensors = {
        "distance": torch.from_numpy(np.where(SAME, 0.5, 1.5) + 0.001 * np.arange(40)),
        "issame": torch.from_numpy(SAME.astype(np.uint8)),
        "folds": torch.arange(40) % 10,
        "people": torch.arange(80).reshape(40, 2),
    }
    tensors = {name: tensor for name, tensor in {**tensors, **changes}.items() if tensor is not None}
    return {name if "/" in name else f"{STEM}.{name}": tensor for name, tensor in tensors.items()}


BAD_SCORES = {
    "no labels": scores(issame=None),
    "no folds": scores(folds=None),
    "no distances": scores(distance=None),
    "folds of floats": scores(folds=torch.zeros(40)),
    "short folds": scores(folds=torch.arange(10)),
    "short labels": scores(issame=torch.zeros(39, dtype=torch.uint8)),
    "a fold of 1e9": scores(folds=torch.tensor([10**9] * 40)),
    "a fold of -1": scores(folds=torch.arange(40) % 10 - 1),
    "an empty fold": scores(folds=torch.arange(40) % 9 + (torch.arange(40) % 9 > 3)),
    "one fold": scores(folds=torch.zeros(40, dtype=torch.int64)),
    "bf16": scores(distance=torch.ones(40, dtype=torch.bfloat16)),
    "fp8": scores(distance=torch.ones(40).to(torch.float8_e4m3fn)),
    "fp32": scores(distance=torch.linspace(0, 1, 40)),
    "labels of int64": scores(issame=torch.arange(40) % 2),
    "labels of 7": scores(issame=torch.full((40,), 7, dtype=torch.uint8)),
    "one class": scores(issame=torch.ones(40, dtype=torch.uint8)),
    "NaN": scores(distance=torch.full((40,), float("nan"), dtype=torch.float64)),
    "infinite": scores(distance=torch.full((40,), float("inf"), dtype=torch.float64)),
    "a distance of 9": scores(distance=torch.linspace(0, 9, 40, dtype=torch.float64)),
    "a matrix": scores(distance=torch.zeros(40, 2, dtype=torch.float64)),
    "a number": scores(distance=torch.zeros((), dtype=torch.float64)),
    "empty": {name: tensor[:0] for name, tensor in scores().items()},
    "people of one": scores(people=torch.arange(40)),
    "a tensor more": scores(secret=torch.zeros(3)),
    "a name with a path": {name.replace("lfw/", "../x/"): tensor for name, tensor in scores().items()},
    "a name with a tag": {name.replace("lfw", "<b>"): tensor for name, tensor in scores().items()},
    "more pairs than any benchmark has": {
        name: tensor.repeat(500, *[1] * (tensor.dim() - 1)) for name, tensor in scores().items()
    },
}


@pytest.mark.parametrize("kind", BAD_SCORES)
def test_scores_that_are_none(tmp_path, kind):
    tracemalloc.start()
    (tmp_path / SCORES).write_bytes(save(BAD_SCORES[kind], {"model": "m"}))
    with pytest.raises(CheckpointError, match=r"scores\.safetensors is damaged .*; delete it and evaluate again"):
        load_scores(tmp_path / SCORES)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("data", [b"", b"\xff" * 7, struct.pack("<Q", 1 << 40), b"x" * 1000], ids=len)
def test_scores_of_other_bytes(tmp_path, data):
    (tmp_path / SCORES).write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_scores(tmp_path / SCORES)
    keep_scores(tmp_path, {"lfw": verify(np.where(SAME, 0.5, 1.5) + 0.001 * np.arange(40), SAME)}, "m")
    assert set(load_scores(tmp_path / SCORES)[0]) == {"lfw"}


def test_whole_scores(tmp_path):
    (tmp_path / SCORES).write_bytes(save(scores(), {"model": "m"}))
    (result,), model = [*load_scores(tmp_path / SCORES)[0].values()], load_scores(tmp_path / SCORES)[1]
    assert (model, result.accuracy, result.data) == ("m", 1.0, "a" * 64)
    (tmp_path / SCORES).write_bytes(save(scores(people=None)))
    assert load_scores(tmp_path / SCORES)[1] == ""


@pytest.fixture
def few_pairs(monkeypatch):
    monkeypatch.setitem(benchmarks.BENCHMARKS, "synthetic", Benchmark("synthetic", 40))
    benchmarks._synthetic_benchmark.cache_clear()
    yield
    benchmarks._synthetic_benchmark.cache_clear()


HEAD = "step,epoch,loss,holdout_auc,alarms,img_per_s\n"
LOGS = {
    "not UTF-8": HEAD.encode() + b"4,1,9.5,0.9,\xff\xfe,100\n8,2,8.5,0.91,,100\n",
    "nothing": b"",
    "a head alone": HEAD.encode(),
    "nan": HEAD.encode() + b"4,1,nan,0.9,,100\n8,2,8.5,0.91,,100\n",
    "inf and 1e400": HEAD.encode() + b"4,1,inf,0.9,,100\n8,2,8.5,1e400,,100\n",
    "1e308": HEAD.encode() + b"4,1,1e308,0.9,,100\n8,2,-1e308,0.91,,100\n",
    "words": HEAD.encode() + b"four,one,x,y,,z\n",
    "cut in a row": HEAD.encode() + b"4,1,9.5,0.9,,100\n8,2,8",
    "a row too long": HEAD.encode() + b"4,1,9.5,0.9,,100,7,7,7\n",
    "no losses": b"step,epoch,loss,holdout_auc,alarms,img_per_s\n4,1,,,,\n8,2,,,,\n",
    "other columns": b"a,b\n1,2\n",
    "a field of 200 kB": HEAD.encode() + b"4,1," + b"9" * 200_000 + b",0.9,,100\n",
    "NUL": HEAD.encode() + b"4,1,\x009.5,0.9,,100\n",
    "a BOM and CRLF": b"\xef\xbb\xbf"
    + HEAD.replace("\n", "\r\n").encode()
    + b"4,1,9.5,0.9,,100\r\n8,2,8.5,0.91,,9\r\n",
    "a lone CR": HEAD.encode() + b"4,1,9.5\r,0.9,,100\n",
}


@pytest.mark.parametrize("kind", LOGS)
def test_a_log_that_is_damaged(tiny_run, tmp_path, capsys, kind, few_pairs):
    """The report and `info` are written all the same, without its rows."""
    (tiny_run / "log.csv").write_bytes(LOGS[kind])
    whole = len(read_epochs(tiny_run))
    note = f"note: {tiny_run / 'log.csv'} is damaged" in capsys.readouterr().err
    assert note is (kind not in ("no losses", "a BOM and CRLF", "not UTF-8"))
    assert whole <= 2 and (whole == 2) >= (kind == "a BOM and CRLF")
    assert main(["info", str(tiny_run)]) == 0
    output = tmp_path / "report.html"
    flags = ["--bench", "synthetic", "--device", "cpu", "--output", str(output)]
    assert main(["evaluate", "--checkpoint", str(tiny_run), *flags]) == 0
    assert ("training loss" in output.read_text()) == (whole == 2 and kind != "no losses")


def test_a_log_in_a_pipes_place(tiny_run):
    os.mkfifo(tiny_run / "log.csv")
    assert read_epochs(tiny_run) == []


TORN = [
    "1",
    "[]",
    '"x"',
    "null",
    '{"step": "x"}',
    '{"step": 1e400}',
    '{"step": null}',
    "{}",
    "[" * 100_000,
    '{"step": 1',
]
TORN += ['{"step": true}', '{"step": 1.5}', "\udcff", '{"step": 1, "loss": {"a": []}}']


def test_a_log_of_other_lines_resumes(tmp_path, monkeypatch, capsys):
    use_tiny(monkeypatch)
    run(settings(tmp_path / "run", epochs=1), with_frozen=False)
    log = tmp_path / "run" / "log.jsonl"
    before = log.read_text()
    epoch = '{"step": 2, "epoch": "x", "loss": [1], "holdout_auc": {"a": 1}, "img_per_s": "\\ud800"}'
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run" / "log.csv").unlink()
    (tmp_path / "run" / "log.csv").symlink_to(victim)
    log.write_bytes("\n".join([*TORN, before, epoch]).encode("utf-8", "surrogateescape"))
    run(settings(tmp_path / "run", epochs=2, resume="auto", allow_changed=True), with_frozen=False)
    assert victim.read_text() == "mine"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(type(row["step"]) is int for row in rows) and rows[-1]["epoch"] == 2
    assert "1 of its 3 rows are left out" in capsys.readouterr().err
    assert "| 2 |" in (tmp_path / "run" / "results.md").read_text()


def reseal(step, **changes):
    """Writes other counters, settings or data into a step directory, as a stranger who knows how it is sealed."""
    state = {**json.loads((step / "training.json").read_text()), **changes}
    data = json_bytes(state)
    (step / "training.json").write_bytes(data)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest.pop("seal")
    manifest["files"]["training.json"] = {"size": len(data), "sha256": sha256_bytes(data)}
    (step / "manifest.json").write_bytes(json_bytes({**manifest, "seal": sha256_bytes(json_bytes(manifest))}))


PROGRESS = {"step": 4, "epoch": 1, "first_step": 4, "epoch_loss": 0.0, "best_epoch": 1, "best_auc": 0.5}
PROGRESS |= {"skipped": 0, "skipped_in_a_row": 0, "finished": False}


def test_counters_of_other_types(tmp_path, monkeypatch):
    use_tiny(monkeypatch)
    run(settings(tmp_path / "run", epochs=1), with_frozen=False)
    whole = tmp_path / "run" / "checkpoints" / "step-4"
    reseal(whole, progress=PROGRESS)
    assert load_state(whole)["progress"] == PROGRESS
    bad = [
        {"step": "x"},
        {"step": 10**400},
        {"step": 4.5},
        {"epoch": None},
        {"finished": "no"},
        {"best_auc": []},
        {"x": 1},
    ]
    changes = [{"progress": {**PROGRESS, **change}} for change in bad]
    changes += [{"progress": value} for value in (None, 3, [], {})]
    changes += [{"settings": value} for value in (None, 3, [])] + [{"data": value} for value in (None, 3, "x", [1])]
    for change in changes:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=True)
        reseal(tmp_path / "copy" / "checkpoints" / "step-4", **{"progress": PROGRESS, **change})
        with pytest.raises(CheckpointError, match=r"training\.json is damaged"):
            run(settings(tmp_path / "copy", epochs=1, resume="auto"), with_frozen=False)


@pytest.mark.parametrize("change", [{"first_step": 0, "step": 4_000_000}, {"first_step": 9}])
def test_counters_that_cannot_be(tmp_path, monkeypatch, change):
    """Which would save the same step for ever."""
    use_tiny(monkeypatch)
    run(settings(tmp_path / "run", epochs=1), with_frozen=False)
    reseal(tmp_path / "run" / "checkpoints" / "step-4", progress={**PROGRESS, **change})
    with pytest.raises(CheckpointError, match="steps into an epoch"):
        run(settings(tmp_path / "run", epochs=1, resume="auto"), with_frozen=False)


CONFIGS = ["[" * 100_000, "[]", "7", "null", "", "{", "\xff", '{"epochs": "x"}', '{"epochs": 1' + "0" * 400 + "}"]
CONFIGS += ['{"lr": NaN}', '{"lr": 1e999}', '{"weights": 7}', '{"exp": []}', '{"backbone": {}}', '{"use_dalora": 1}']


@pytest.mark.parametrize("text", CONFIGS, ids=lambda text: text[:20])
def test_settings_of_other_types(tiny_run, capsys, text, few_pairs):
    """Resuming needs them; using the model does not; the table of experiments leaves such a run out."""
    config = tiny_run / "config.json"
    config.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged .*; put a copy of it back"):
        read_config(tiny_run)
    assert main(["train", "--resume", str(tiny_run)]) == 2
    assert "config.json is damaged" in capsys.readouterr().err
    assert main(["evaluate", "--checkpoint", str(tiny_run), "--bench", "synthetic", "--device", "cpu"]) == 0
    other = tiny_run.parent / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(dataclasses.asdict(resolve({"exp": "exp_002"}))))
    capsys.readouterr()
    assert main(["experiments", "--runs", str(tiny_run.parent)]) == 0
    printed = capsys.readouterr()
    assert f"left out: {config} is damaged" in printed.err and "| exp_002 | other |" in printed.out


def test_scores_of_a_stranger_are_named_where_they_are_read(tiny_run, capsys, few_pairs):
    """`--compare` and the table of experiments; an evaluation replaces them, with a note."""
    (tiny_run / SCORES).write_bytes(save(BAD_SCORES["a fold of 1e9"], {"model": "m"}))
    assert main(["evaluate", "--compare", str(tiny_run), str(tiny_run)]) == 2
    assert "scores.safetensors is damaged" in capsys.readouterr().err
    assert main(["evaluate", "--checkpoint", str(tiny_run), "--bench", "synthetic", "--device", "cpu"]) == 0
    assert "note: " in capsys.readouterr().err and set(load_scores(tiny_run / SCORES)[0]) == {"synthetic"}


def test_scores_are_of_every_kind_that_is_written(tmp_path):
    people = np.arange(80, dtype=np.int32).reshape(40, 2)
    result = verify(np.where(SAME, 0.5, 1.5) + 0.001 * np.arange(40), SAME, (np.arange(40) % 10).astype("i4"), people)
    save_scores(tmp_path / SCORES, {"cfp_fp": dataclasses.replace(result, data="b" * 64)}, "m")
    np.testing.assert_array_equal(load_scores(tmp_path / SCORES)[0]["cfp_fp"].people, people)


def test_an_epoch_is_saved_before_its_line_is_printed(tmp_path, monkeypatch):
    """As in `vitface train | head -1`."""
    use_tiny(monkeypatch)

    def closed(text):
        if text.startswith("epoch"):
            raise BrokenPipeError

    monkeypatch.setattr("vitface.training.loop.print0", closed)
    with pytest.raises(BrokenPipeError):
        run(settings(tmp_path / "run"))
    assert load_state(tmp_path / "run" / "checkpoints" / "step-4")["progress"]["epoch"] == 1


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "[[]]"])
def test_a_manifest_that_is_none(tiny_run, capsys, text):
    (tiny_run / "checkpoints" / "step-7" / "manifest.json").write_text(text)
    for words in (["info", str(tiny_run)], ["info", str(tiny_run / "checkpoints" / "step-7")]):
        assert main(words) == 2 and "manifest.json is damaged" in capsys.readouterr().err


def test_a_manifest_of_nested_versions(tiny_run, capsys):
    path = tiny_run / "checkpoints" / "step-7" / "manifest.json"
    nested = '{"a":' * 900 + "1" + "}" * 900
    path.write_text(path.read_text().replace('"vitface_version": ', f'"vitface_version": {nested}, "other": '))
    assert main(["info", str(tiny_run)]) == 0
    assert main(["info", str(tiny_run), "--json"]) == 0
