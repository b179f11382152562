"""What runs say while they run: on terminals, in logs, and to trackers."""

import io
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from cases import case
from PIL import Image

from vitface.config import resolve
from vitface.data import progress
from vitface.data.progress import Progress
from vitface.evaluation.benchmarks import _embed_all, in_order
from vitface.evaluation.protocol import verify
from vitface.training.finish import Evaluation, tracked_results
from vitface.training.ranks import process_group
from vitface.training.runs import log
from vitface.training.runs.log import RunLog
from vitface.training.setup import open_inputs

KIND = "What runs say while they run"


def work(steps, **options):
    with Progress(total=steps, desc="epoch 1/20", unit="img", unit_scale=64, leave=False, **options) as bar:
        for step in range(steps):
            bar.set_postfix(loss=f"{9 - step / 100:.2f}", refresh=False)
            bar.update()


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is half a second after the last."""
    ticks = iter(np.arange(0, 1e6, 0.5))
    monkeypatch.setattr("tqdm.std.time", lambda: float(next(ticks)))


@case(
    "a run in a log (`> train.log`, nohup, Slurm)",
    "a line a minute with the losses, no carriage returns",
)
def test_lines_in_a_log(clock, capsys):
    work(200)
    printed = capsys.readouterr().err
    assert "\r" not in printed and 1 <= printed.count("\n") <= 5
    for line in printed.splitlines():
        assert line.startswith("epoch 1/20:") and "/12800 [" in line and "img/s, loss=" in line


@case("work of a few seconds in a log", "no line at all")
def test_short_work_in_a_log(capsys):
    work(20)
    assert capsys.readouterr().err == ""


@case("a run on a terminal", "tqdm's bar")
def test_a_bar_on_a_terminal(monkeypatch):
    terminal = SimpleNamespace(isatty=lambda: True)
    shown = io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=terminal))
    work(20, file=shown)
    assert "\r" in shown.getvalue() and "epoch 1/20" in shown.getvalue()


NOTEBOOK = """
import sys
from types import ModuleType, SimpleNamespace
from vitface.errors import VitfaceError

class Widget:
    made = []
    def __init__(self, children=(), **values):
        self.__dict__.update(values, children=children, layout=SimpleNamespace(), style=SimpleNamespace(), bar_style="")
        Widget.made.append(self)
    def close(self):
        pass

kernel = SimpleNamespace(config={"IPKernelApp": {}})
for name, parts in {
    "IPython": {"get_ipython": lambda: kernel},
    "IPython.display": {"display": lambda widget: print("shown", len(widget.children))},
    "ipykernel.zmqshell": {},
    "ipywidgets": dict.fromkeys(["HBox", "HTML", "FloatProgress"], Widget),
}.items():
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__dict__.update(parts, __version__="8")

from vitface.data.progress import Progress
with Progress(total=20, desc="epoch 1/20", unit_scale=64, mininterval=0, leave=False, dynamic_ncols=True) as bar:
    for _ in range(20):
        bar.update()
_, shown, text = bar.container.children
print(shown.max, shown.value, "1280/1280" in text.value)
"""


@case("a run in a notebook that has ipywidgets", "the notebook's own bar, no lines of text")
def test_the_bar_of_a_notebook():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", NOTEBOOK], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("shown 3\n1280 1280 True\n", "", 0)


@case("torchrun, several ranks", "the first one alone shows progress")
def test_one_rank_shows_progress(clock, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    work(400)
    assert capsys.readouterr().err == ""


@case("an evaluation of minutes", "shows its progress, with the benchmark's name")
def test_an_evaluation_shows_its_progress(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    rows = _embed_all(lambda images: np.ones((len(images), 4)), lambda i: np.zeros(3), 300, in_order, "lfw")
    assert len(rows) == 300
    assert capsys.readouterr().err.splitlines()[-1].startswith("evaluating lfw: 100% 300/300 [")


class Wandb:
    """A stand-in for the package: what it was told."""

    def __init__(self):
        self.inits, self.rows, self.finished, self.plot = [], [], 0, self

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        self.finished += 1

    def line_series(self, xs, ys, keys, title, xname):
        return ("chart", keys, title, [len(x) for x in xs], [len(y) for y in ys])


@pytest.fixture
def wandb(monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def start(folder, step=0):
    folder.mkdir(parents=True, exist_ok=True)
    return RunLog(folder, resolve({"wandb": True}), step)


@case("`--wandb` in two runs whose folders have one name", "two ids: they do not merge")
def test_runs_of_one_name_do_not_merge(tmp_path, wandb):
    for place in ("a", "b"):
        start(tmp_path / place / "run")
    one, two = wandb.inits
    assert one["name"] == two["name"] == "run" and one["id"] != two["id"]


@case("`--wandb` and `--resume auto`", "the same id, kept in the run")
def test_a_resumed_run_goes_on_in_wandb(tmp_path, wandb):
    start(tmp_path / "run")
    start(tmp_path / "run", 40)
    one, two = wandb.inits
    assert one["id"] == two["id"] == (tmp_path / "run" / "wandb-id.txt").read_text() and two["resume"] == "allow"


@pytest.mark.parametrize("kept", [b"\xff\xfe", b"a/b", b"x" * 2000])
@case("`wandb-id.txt` that is not UTF-8, or no id", "a new id, with a note")
def test_a_damaged_id_of_wandb(tmp_path, wandb, capsys, kept):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb-id.txt").write_bytes(kept)
    start(tmp_path / "run")
    assert wandb.inits[0]["id"] == (tmp_path / "run" / "wandb-id.txt").read_text() and len(wandb.inits[0]["id"]) == 16
    assert "wandb-id.txt is damaged; the run gets a new id" in capsys.readouterr().err


@case("`--wandb` at the end of a run", "accuracy, AUC, EER and ROC of each benchmark are sent, and the run is finished")
def test_benchmarks_and_curves_are_sent(tmp_path, wandb):
    issame = np.arange(400) % 2 == 0
    result = verify(np.random.default_rng(0).uniform(0, 2, 400) + ~issame, issame)
    sections = {"frozen backbone, raw CLS": Evaluation({"lfw": result}, [], [])}
    sections["adapted, best epoch"] = Evaluation({"lfw": result, "cfp_fp": result}, [], [])
    run = start(tmp_path / "run")
    run.epoch(step=7, epoch=1, loss=1.0, holdout_auc=0.9)
    run.results(tracked_results(sections))
    step, values = wandb.rows[-1]
    assert step == 7 and values["adapted/lfw/accuracy"] == values["frozen/lfw/accuracy"] == result.accuracy
    assert values["adapted/cfp_fp/eer"] == result.eer
    kind, keys, title, *lengths = values["adapted/ROC"]
    assert (kind, keys, title) == ("chart", ["lfw", "cfp_fp"], "ROC, adapted, best epoch")
    assert all(50 <= length <= 100 for points in lengths for length in points)
    assert wandb.finished == 1


@case("`--tensorboard` at the end of a run", "the numbers are sent, charts are left out")
def test_tensorboard_takes_the_numbers(tmp_path, monkeypatch):
    scalars = []
    writer = SimpleNamespace(
        add_scalar=lambda name, value, step: scalars.append((name, value, step)), flush=lambda: None
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: writer))
    track = log._tensorboard(tmp_path, resolve({}))
    track({"step": 3, "adapted/lfw/accuracy": 0.9, "adapted/ROC": log.Curves("ROC", "x", {})})
    assert ("adapted/lfw/accuracy", 0.9, 3) in scalars and not any("ROC" in name for name, *_ in scalars)


@case("notes about the data under `torchrun`", "printed once, by the first process")
def test_notes_are_printed_by_rank_0(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    for person in "ab":
        (tmp_path / "set" / person).mkdir(parents=True)
        Image.fromarray(np.zeros((112, 112, 3), np.uint8)).save(tmp_path / "set" / person / "1.png")
    (tmp_path / "set" / "a" / "2.png").write_bytes(b"damaged")
    (tmp_path / "set" / "a" / "3.psd").touch()
    config = resolve({"exp": "demo", "weights": "random", "train_data": str(tmp_path / "set"), "num_workers": 0})
    said = []
    for rank in (0, 1):
        monkeypatch.setattr(process_group, "rank", lambda rank=rank: rank)
        assert len(open_inputs(config)) == 2
        said.append(capsys.readouterr().out)
    assert "left out 1: a/3.psd" in said[0] and "1 images were skipped, see " in said[0] and said[1] == ""
