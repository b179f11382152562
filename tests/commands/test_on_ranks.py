"""`embed` and `evaluate` under torchrun: the bits of one process, one voice, one writer, one message if it fails."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import randomise_adapters
from drawn import drawn_faces, jpeg
from ijb import write_ijb
from PIL import Image
from ranks import in_ranks

import vitface
from vitface.__main__ import main
from vitface.commands import inputs
from vitface.errors import ConfigError
from vitface.evaluation import benchmarks
from vitface.evaluation.ijb import embedding
from vitface.gallery import from_folder
from vitface.model.face import FaceModel
from vitface.store.backbone import load_backbone
from vitface.store.faces import frozen_face, trained_tensors
from vitface.training.estimate import duration
from vitface.training.ranks import process_group
from vitface.training.runs.checkpoint import save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
ROOT = Path(__file__).parents[2]
COUNT = 21


@pytest.fixture
def faces(tmp_path, monkeypatch, tiny_run):
    """21 crops of three people, embedded four at a time; and a small "synthetic"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(from_folder, "CHUNK", 4)
    monkeypatch.setattr(benchmarks, "BATCH_SIZE", 16)
    monkeypatch.setattr(process_group, "HEARTBEAT", 0.3)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "synthetic", benchmarks.Benchmark("synthetic", 100))
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = tmp_path / "faces" / f"p{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (112, 112, 3), np.uint8)).save(path)
    return tmp_path / "faces"


def on_ranks(count, *words, each=lambda number: None):
    """[(exit code, stdout, stderr)] of a command on so many ranks; `each` prepares one."""

    def act(number):
        sys.stdout, sys.stderr = (open(f"{name}-{number}", "w", 1) for name in ("out", "err"))  # noqa: SIM115
        each(number)
        try:
            return main([str(word) for word in words])
        except SystemExit as stop:
            return stop.code

    codes = in_ranks(count, act, 100)
    return [(code, Path(f"out-{n}").read_text(), Path(f"err-{n}").read_text()) for n, code in enumerate(codes)]


def contents(gallery):
    """The names, and the bits of the rows."""
    gallery = vitface.Gallery.load(gallery)
    return gallery.names, gallery.embeddings.tobytes(), gallery.settings


@pytest.mark.parametrize(("count", "num_workers"), [(2, 0), (3, 2)])
def test_embed_gives_the_rows_of_one_process(faces, capsys, count, num_workers):
    (faces / "p0" / "bad.png").write_bytes(b"?")
    assert main(["embed", "faces", "whole", "--num-workers", "0"]) == 1
    alone, (first, *others) = (
        capsys.readouterr(),
        on_ranks(count, "embed", "faces", "cut", "--num-workers", num_workers),
    )
    assert contents("cut") == contents("whole") and len(contents("cut")[0]) == COUNT
    assert first == (1, alone.out.replace("whole", "cut"), alone.err)
    assert others == [(0, "", "")] * (count - 1)

    shutil.rmtree(faces / "p2")
    (faces / "p1" / "1.png").write_bytes((faces / "p0" / "0.png").read_bytes())
    main(["embed", "faces", "whole", "--num-workers", "0", "--prune"])
    on_ranks(count, "embed", "faces", "cut", "--num-workers", 0, "--prune")
    assert contents("cut") == contents("whole") and len(contents("cut")[0]) == COUNT - 7


def test_a_folder_of_fewer_images_than_ranks(faces, capsys):
    for path in sorted(faces.rglob("*.png"))[1:]:
        path.unlink()
    assert [code for code, *_ in on_ranks(3, "embed", "faces", "people")] == [0, 0, 0]
    assert len(vitface.Gallery.load("people")) == 1
    again = on_ranks(2, "embed", "faces", "people")
    assert "1 images, 0 of them new" in again[0][1] and again[1] == (0, "", "")


def test_evaluate_gives_the_results_of_one_process(faces, tiny_run, capsys):
    words = ["evaluate", "--checkpoint", tiny_run, "--bench", "synthetic", "--json"]
    assert main([str(word) for word in [*words, "one.json"]]) == 0
    alone = capsys.readouterr()
    scores = (tiny_run / "scores.safetensors").read_bytes()
    (tiny_run / "scores.safetensors").unlink()
    first, second = on_ranks(2, *words, "two.json")
    assert first == (0, alone.out, alone.err) and second == (0, "", "")
    assert json.loads(Path("one.json").read_text()) == json.loads(Path("two.json").read_text())
    assert (tiny_run / "scores.safetensors").read_bytes() == scores


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("embed gone people", "error: gone does not exist"),
        ("embed faces faces", "error: faces is not empty"),
        ("embed faces people --checkpoint gone", "error: gone is neither a run directory"),
        ("evaluate --bench lfw --data-dir gone", "error: gone/lfw.bin"),
        ("evaluate --bench lfw --routing --image-size 8", "error: a checkpoint knows its image size"),
    ],
)
def test_a_mistake_is_told_once(faces, words, message):
    done = on_ranks(2, *words.split())
    told = "".join(err for *_, err in done)
    assert [code for code, *_ in done] == [2, 2] and told.count("error: ") == 1
    assert message in told and "Traceback" not in told and not any(out for _, out, _ in done)


@pytest.mark.parametrize("broken", [0, 1])
def test_what_goes_wrong_on_one_rank_ends_all_with_one_message(faces, broken):
    def failing(error):
        def prepare(number):
            if number == broken:
                from_folder.sha256_bytes = lambda data: (_ for _ in ()).throw(error)

        return prepare

    for number, error in enumerate((ConfigError("this rank is mad"), OSError(5, "Input/output error"))):
        done = on_ranks(2, "embed", "faces", f"people-{number}", "--num-workers", 0, each=failing(error))
        told = "".join(err for *_, err in done)
        assert [code for code, *_ in done] == [2, 2] and told.count("error: ") == 1, told
        assert str(error) in told and "Traceback" not in told


def test_ranks_with_different_models_are_found(faces, tiny_run):
    other = shutil.copytree(tiny_run, tiny_run.parent / "other", symlinks=True)
    model = FaceModel(load_backbone("tiny", "random", 32), vitface.load(tiny_run).config).eval()
    save_checkpoint(other, 8, trained_tensors(model), dataclasses.asdict(model.config), {}, {}, is_best=True)

    def each(number):
        inputs.newest_run = lambda: (tiny_run, other)[number]

    done = on_ranks(2, "embed", "faces", "people", each=each)
    told = "".join(err for *_, err in done)
    assert [code for code, *_ in done] == [2, 2] and "rank 1 has other model than rank 0" in told
    assert not Path("people").exists()


def test_a_dry_run_predicts_and_writes_nothing(faces, tiny_run, capsys):
    assert main(["embed", "faces", "people", "--num-workers", "0", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == COUNT and found["seconds"] == pytest.approx(COUNT / found["images_per_second"])
    (code, out, _), other = on_ranks(2, "embed", "faces", "people", "--num-workers", "0", "--dry-run")
    assert re.fullmatch(r"21 images to embed: about \d+ s, at [\d,.]+ images/s; nothing was written\n", out)
    assert code == 0 and other == (0, "", "") and not Path("people").exists()

    assert main(["evaluate", "--bench", "synthetic", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.match(r"200 images of synthetic: about \d+ s, at [\d,.]+ images/s before reading; nothing", out)
    assert main(["evaluate", "--bench", "lfw", "--dry-run"]) == 2
    assert "error: data/lfw.bin" in capsys.readouterr().err

    assert main(["embed", "faces", "people", "--num-workers", "2"]) == 0
    (faces / "p0" / "0.png").write_bytes((faces / "p1" / "1.png").read_bytes())
    capsys.readouterr()
    main(["embed", "faces", "people", "--num-workers", "2", "--dry-run"])
    assert capsys.readouterr().out.startswith("1 images to embed")
    main(["embed", "faces", "people", "--num-workers", "2"])
    capsys.readouterr()
    main(["embed", "faces", "people", "--dry-run"])
    assert capsys.readouterr().out.startswith("0 images to embed: about 0 s")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("size", [1, 3, 4, 5, 8, 9, COUNT])
def test_a_rate_is_that_of_what_was_embedded(faces, monkeypatch, size, num_workers):
    """Each chunk of 4 takes 0.3 s on a clock of its own; the first ones warm up, if others follow."""
    now = [0.0]
    monkeypatch.setattr(from_folder.time, "perf_counter", lambda: now[0])

    def embed(chunks):
        for chunk in chunks:
            now[0] += 0.075 * len(chunk)
            yield None, None

    names = [str(i) for i in range(size)]
    assert from_folder.images_per_second(embed, names, num_workers) == pytest.approx(1 / 0.075)


def test_durations_are_said_as_people_say_them():
    said = {0.4: "0 s", 99.4: "99 s", 100: "2 min", 5940: "99 min", 6000: "1 h 40 min", 12_000: "3 h 20 min"}
    said |= {170_000: "47 h 13 min", 190_800: "2 days 5 h"}
    assert {seconds: duration(seconds) for seconds in said} == said


@pytest.mark.slow
def test_torchrun_starts_both_commands(tmp_path):
    """Two processes against one, as a user starts them."""
    changes = dict(lora_rank=2, head="linear", embedding_dim=32)
    config = dataclasses.replace(frozen_face("vit_nano", None, 112).config, **changes)
    model = FaceModel(load_backbone("vit_nano", None, 112), config).eval()
    randomise_adapters(model)
    save_checkpoint(tmp_path / "run", 1, trained_tensors(model), dataclasses.asdict(config), {}, {}, is_best=True)
    assert main(["data", "draw", str(tmp_path / "faces"), "--people", "5", "--images", "20"]) == 0

    def started(*words, ranks):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)

    words = ["--checkpoint", "run", "--num-workers", "1"]
    alone = started("-m", "vitface", "embed", "faces", "whole", *words, ranks=1)
    cut = started("-m", "vitface", "embed", "faces", "cut", *words, ranks=2)
    assert cut.returncode == alone.returncode == 0, cut.stderr
    assert cut.stdout == alone.stdout.replace("whole", "cut") and contents(tmp_path / "cut") == contents(
        tmp_path / "whole"
    )
    script = tmp_path / "small.py"
    script.write_text(f"""
import runpy
from vitface.evaluation.benchmarks import BENCHMARKS, Benchmark
BENCHMARKS["synthetic"] = Benchmark("synthetic", 300)
runpy.run_path({str(ROOT / "evaluate.py")!r}, run_name="__main__")
""")
    words = [str(script), "--checkpoint", "run", "--bench", "synthetic", "--json"]
    alone, cut = started(*words, "one.json", ranks=1), started(*words, "two.json", ranks=2)
    assert cut.returncode == alone.returncode == 0 and cut.stdout == alone.stdout, cut.stderr
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


@pytest.mark.parametrize("count", [2, 3])
def test_ijb_gives_the_files_of_one_process(tmp_path, monkeypatch, tiny_run, count):
    drawn = drawn_faces(people=6, images=8)
    home = write_ijb(tmp_path / "data", crops=lambda person, number: jpeg(drawn[person * 8 + number % 8]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embedding, "PART", 7)
    words = ["evaluate", "--bench", "ijbc", "--checkpoint", tiny_run, "--device", "cpu", "--num-workers", 0, "--json"]
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "one"))
    assert main([str(word) for word in (*words, "one.json")]) == 0
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "several"))
    (code, out, _), *others = on_ranks(count, *words, "several.json")
    assert code == 0 and "TAR at FAR" in out and all(other == (0, "", "") for other in others)
    assert Path("one.json").read_bytes() == Path("several.json").read_bytes()
    one, several = (
        {path.name: path.read_bytes() for path in Path(f).glob("ijbc/*/part-*")} for f in ("one", "several")
    )
    assert one == several and len(one) == -(-len(list(home.glob("loose_crop/*"))) // 7)
