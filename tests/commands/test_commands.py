"""The commands on a tiny run, in one process: what they print, write and return."""

import csv
import json
import re
from datetime import datetime

import numpy as np
import pytest
from PIL import Image

import vitface
import vitface.__main__
from vitface.commands import data
from vitface.commands.inputs import NO_THRESHOLD
from vitface.data.faces.detect import Face, FaceDetector
from vitface.data.formats.pair_lists import PAIR_LISTS
from vitface.data.images import read_image
from vitface.evaluation import plots
from vitface.evaluation.protocol import verify
from vitface.evaluation.scores import keep_scores
from vitface.store.faces import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def faces(tmp_path, monkeypatch, tiny_run):
    """Six crops of three people; `runs/tiny` is the newest run."""
    monkeypatch.chdir(tmp_path)
    for person in range(3):
        own = np.random.default_rng(person).integers(0, 256, (112, 112, 3), np.uint8)
        for number in range(2):
            path = tmp_path / "faces" / f"p{person}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(own, number, axis=1)).save(path)
    return tmp_path / "faces"


def call(capsys, *arguments):
    """(exit code, stdout, stderr) of a command."""
    code = vitface.__main__.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def cosine(model, first, second):
    rows = model.embed([first, second]).astype("f8")
    return rows[0] @ rows[1]


def test_verify_answers_by_its_exit_code(faces, tiny_run, capsys):
    pair = faces / "p0" / "0.png", faces / "p1" / "1.png"
    score = cosine(vitface.load(tiny_run), *pair)
    code, out, err = call(capsys, "verify", *pair, "--json", "--checkpoint", tiny_run)
    expected = {"score": pytest.approx(score, abs=1e-5), "threshold": 0.6, "far": 0.001, "same": score >= 0.6}
    assert {key: json.loads(out)[key] for key in expected} == expected and code == int(score < 0.6)
    code, out, err = call(capsys, "verify", pair[0], pair[0])
    assert code == 0 and out.startswith("same person: cosine 1.0000 >= 0.6000 (FAR 0.001: 1 in 1,000 pairs")
    assert err == f"checkpoint: {tiny_run.relative_to(faces.parent)}\n"
    code, out, _ = call(capsys, "verify", *pair, "--threshold", f"{score + 1e-3:.5f}")
    assert code == 1 and out.startswith("different people") and "your own threshold" in out
    assert call(capsys, "verify", *pair, "--threshold", f"{score - 1e-3:.5f}")[0] == 0
    assert json.loads(call(capsys, "verify", *pair, "--far", "0.01", "--json")[1])["threshold"] == 0.2


def test_verify_without_thresholds_has_no_answer(faces, tiny_run, capsys):
    (tiny_run / "thresholds.json").unlink()
    code, out, err = call(capsys, "verify", faces / "p0" / "0.png", faces / "p0" / "0.png")
    assert code == 2 and out == "no verdict: cosine 1.0000, no threshold was calibrated\n" and NO_THRESHOLD in err
    code, out, _ = call(capsys, "verify", faces / "p0" / "0.png", faces / "p0" / "0.png", "--json")
    assert code == 2 and json.loads(out)["same"] is None
    assert call(capsys, "verify", faces / "p0" / "0.png", faces / "p0" / "0.png", "--threshold", "0.5")[0] == 0


def test_photos_are_aligned_unless_they_are_crops(faces, tmp_path, monkeypatch, capsys):
    photo = np.pad(read_image(faces / "p0" / "0.png"), ((50, 50), (50, 50), (0, 0)))
    Image.fromarray(photo).save(tmp_path / "photo.png")
    code, _, err = call(capsys, "verify", tmp_path / "photo.png", faces / "p0" / "0.png")
    assert code == 2 and ("vitface fetch yunet" in err or "pip install opencv-python-headless" in err)
    code, out, _ = call(capsys, "verify", tmp_path / "photo.png", faces / "p0" / "0.png", "--no-align", "--json")
    assert json.loads(out)["score"] < 0.999  # the whole photo, taken for a crop
    from vitface.data.faces.alignment import TEMPLATE

    monkeypatch.setattr(FaceDetector, "__init__", lambda self, model=None: None)
    found = [Face(np.array([60, 60, 90, 90]), TEMPLATE + 50, 0.9)]
    monkeypatch.setattr(FaceDetector, "detect", lambda self, image: found)
    code, out, _ = call(capsys, "verify", tmp_path / "photo.png", faces / "p0" / "0.png", "--json")
    assert code == 0 and json.loads(out)["score"] > 0.99
    found.clear()
    code, _, err = call(capsys, "verify", tmp_path / "photo.png", faces / "p0" / "0.png")
    assert code == 2 and "photo.png: no face found" in err


def test_embed_search_cluster(faces, tiny_run, capsys):
    code, out, _ = call(capsys, "embed", faces, "people", "--num-workers", 0, "--json")
    assert code == 0 and json.loads(out) | {"total": 6, "new": 6, "skipped": [], "gone": []} == json.loads(out)
    (faces / "p0" / "bad.png").write_bytes(b"?")
    code, out, err = call(capsys, "embed", faces, "people", "--num-workers", 2)
    assert code == 1 and "people: 6 images, 0 of them new, 1 skipped" in out and "bad.png: not a JPEG" in err

    gallery, model = vitface.Gallery.load("people"), vitface.load(tiny_run)
    assert gallery.thresholds == {0.01: 0.2, 0.001: 0.6}
    code, out, _ = call(
        capsys, "search", "people", faces / "p1" / "0.png", faces / "p2" / "1.png", "--json", "--top", 9
    )
    entries = json.loads(out)
    for entry, query in zip(entries, ("p1/0.png", "p2/1.png"), strict=True):
        assert entry["photo"] == str(faces / query) and entry["threshold"] == 0.6 and len(entry["matches"]) == 3
        assert entry["matches"][0]["name"] == query
        assert sorted(match["person"] for match in entry["matches"]) == ["p0", "p1", "p2"]
        for match in entry["matches"]:
            assert match["score"] == pytest.approx(cosine(model, faces / query, faces / match["name"]), abs=1e-5)
            assert match["same"] == (match["score"] >= 0.6)
    assert code == 0
    code, out, _ = call(capsys, "search", "people", faces / "p1" / "0.png", "--top", 1, "--threshold", 1)
    assert code in (0, 1) and "p1/0.png: cosine and person, threshold 1.0000\n   1.0000  p1  (p1/0.png)" in out
    assert out.count("\n") == 2

    code, out, _ = call(capsys, "cluster", "people", "--threshold", 0.999, "--out", "groups.csv", "--json")
    groups = json.loads(out)
    assert code == 0 and sorted(name for names in groups.values() for name in names) == sorted(gallery.names)
    with open("groups.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"]: row["cluster"] for row in rows} == {n: g for g, names in groups.items() for n in names}
    code, out, _ = call(capsys, "cluster", "people", "--threshold", -1)
    assert out.startswith(
        "6 images; people at cosine -1.0000: 1, of whom with several images: 1\n     0      6 images  p0/0.png, "
    )
    assert out.endswith(
        "\nif each of the 3 folders is a person: pairwise F 0.3333, precision 0.2000, recall 1.0000; "
        "BCubed F 0.5000, precision 0.3333, recall 1.0000\n"
    )
    gallery = vitface.Gallery.load("people")
    gallery.add(["2024/summer/1.jpg"], gallery.embeddings[:1])
    gallery.save("albums")
    assert "folders" not in call(capsys, "cluster", "albums", "--threshold", -1)[1]


def test_nobody_reaches_the_threshold(faces, tmp_path, capsys):
    call(capsys, "embed", faces / "p0", "people", "--num-workers", 0)
    score = vitface.load("runs/tiny").embed([faces / "p1" / "0.png"])
    best = vitface.Gallery.load("people").search(score, 1)[0][0].score
    query = ["search", "people", faces / "p1" / "0.png", "--threshold"]
    assert call(capsys, *query, f"{best - 1e-3:.5f}")[0] == 0
    code, out, _ = call(capsys, *query, f"{best + 1e-3:.5f}")
    assert code == 1 and "(below the threshold)" in out


def test_info(faces, tiny_run, capsys):
    code, out, _ = call(capsys, "info", tiny_run, "--json")
    found = json.loads(out)
    model = open_checkpoint(tiny_run).load()
    assert code == 0 and found["kind"] == "checkpoint" and found["step"] == 7
    assert found["thresholds"] == {"0.01": 0.2, "0.001": 0.6}
    assert found["settings"]["lora_rank"] == 4 and found["settings"]["num_domains"] == 3
    assert found["parameters"]["all"]["total"] == sum(p.numel() for p in model.parameters())
    assert found["parameters"]["all"]["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    code, out, _ = call(capsys, "info")
    assert code == 0 and "lora_rank          4\n" in out and "of them trained" in out
    assert found["benchmarks"] == {} and datetime.fromisoformat(found["written"]) <= datetime.now()
    issame = np.arange(200) % 2 == 0
    result = verify(np.where(issame, 0.5, 1.5) + np.arange(200) / 100, issame)
    keep_scores(tiny_run, {"lfw": result}, open_checkpoint(tiny_run).sha256)
    told = json.loads(call(capsys, "info", "--json")[1])["benchmarks"]["lfw"]
    assert told == {key: getattr(result, key) for key in ("accuracy", "std", "auc", "eer")}
    accuracy, std, eer = (100 * value for value in (result.accuracy, result.std, result.eer))
    text = f"accuracy {accuracy:.2f} ± {std:.2f} %, AUC {result.auc:.4f}, EER {eer:.2f} %"
    assert f"lfw                {text}\n" in call(capsys, "info")[1]
    keep_scores(tiny_run, {"lfw": result}, "another model")
    assert json.loads(call(capsys, "info", "--json")[1])["benchmarks"] == {}
    call(capsys, "embed", faces, "people", "--num-workers", 0)
    assert json.loads(call(capsys, "info", "people", "--json")[1])["images"] == 6
    backbone = vitface.__path__[0] + "/../weights/vit_nano.safetensors"
    assert json.loads(call(capsys, "info", backbone, "--json")[1])["parameters"] == 898_304
    (tiny_run / "checkpoints" / "step-7" / "model.json").write_text("{}")
    code, _, err = call(capsys, "info", tiny_run)
    assert code == 2 and "model.json is damaged" in err


def test_explain(faces, tiny_run, tmp_path, capsys):
    code, out, _ = call(capsys, "explain", faces / "p0" / "0.png", "-o", "out.png", "--json")
    found, model = json.loads(out), vitface.load(tiny_run)
    np.testing.assert_allclose(found["domain_weights"], model.domain_weights([faces / "p0" / "0.png"])[0], atol=1e-6)
    np.testing.assert_allclose(found["attention"], model.attention([faces / "p0" / "0.png"])[0].mean(axis=0), atol=1e-6)
    assert code == 0
    picture = read_image(tmp_path / "out.png")
    face, heat = picture[12:348, 12:348].astype(int), picture[12:348, 360:696].astype(int)
    crop = read_image(faces / "p0" / "0.png")
    small = face.reshape(112, 3, 112, 3, 3).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), crop.ravel())[0, 1] > 0.9  # enlarged, bicubic
    coloured = plots.heat(face.astype(np.uint8), np.array(found["attention"])).astype(int)
    assert np.abs(coloured - heat).max() <= 6 and np.ptp(heat) > 60
    blue = picture[:, :, 2].astype(int) - picture[:, :, 0] > 150
    lengths = [blue[456 + 24 * k, :640].sum() for k in range(3)]
    np.testing.assert_allclose(lengths, 538 * np.array(found["domain_weights"]), atol=2)
    assert found["domains"] == ["domain 0", "domain 1", "domain 2"]
    assert "domain weights: domain 0 = 0." in call(capsys, "explain", faces / "p0" / "0.png", "-o", "out.png")[1]
    frozen = call(capsys, "explain", faces / "p0" / "0.png", "-o", "out.png", "--backbone", "vit_nano")[1]
    assert frozen == "wrote out.png\na frozen backbone: no adapters, no domains\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "gone.jpg", "gone.jpg"], "gone.jpg: No such file"),
        (["verify", "A", "A", "--checkpoint", "nowhere"], "nowhere is neither a run directory nor a checkpoint"),
        (["verify", "A", "A", "--far", "0.5"], "there is: 0.001, 0.01"),
        (["verify", "A", "A", "--threshold", "45"], "--threshold is a cosine, from -1 to 1, not 45"),
        (["verify", "A", "A", "--detector", "x.onnx", "--no-align"], "leave one of them out"),
        (["verify", "A", "A", "--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["embed", "nowhere", "people"], "nowhere does not exist"),
        (["embed", "faces", "faces"], "is not empty"),
        (["search", "faces", "A"], "faces is not a gallery; make one with vitface embed"),
        (["search", "faces", "A", "--top", "0"], "--top must be at least 1"),
        (["cluster", "nowhere"], "nowhere is not a gallery"),
        (["info", "nowhere"], "nowhere is neither a run directory nor a checkpoint"),
        (["explain", "A", "-o", "out.png", "--block", "9"], "block must be 0 to 1"),
    ],
)
def test_mistakes_are_answered_with_what_to_do(faces, capsys, arguments, message):
    photo = str(faces / "p0" / "0.png")
    code, out, err = call(capsys, *(photo if argument == "A" else argument for argument in arguments))
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and message in err and out == ""


def test_without_a_run_the_way_to_one_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (112, 112)).save("a.png")
    code, _, err = call(capsys, "verify", "a.png", "a.png")
    assert code == 2 and "vitface train --exp demo" in err and "--checkpoint RUN" in err


def test_a_gallery_of_another_model_is_refused(faces, tiny_run, capsys):
    call(capsys, "embed", faces, "people", "--num-workers", 0)
    settings = json.loads((faces.parent / "people" / "gallery.json").read_text())
    (faces.parent / "people" / "gallery.json").write_text(json.dumps({**settings, "model": "0" * 64}))
    code, _, err = call(capsys, "search", "people", faces / "p0" / "0.png")
    assert code == 2 and "was made by another model than" in err
    code, _, err = call(capsys, "embed", faces, "people")
    assert code == 2 and "was made with another model" in err


def test_every_command_has_help_with_examples(capsys):
    for name in vitface.__main__.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            vitface.__main__.main([name, "--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and "examples:" in out and f"  vitface {name} " in out, name
        assert max(out.count("pe_core_t16"), out.count("siglip2_vitb16")) <= 1, name  # the list of backbones, once


def test_the_list_of_commands_shows_an_example_of_each(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and call(capsys) == (0, out, "")
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("  vitface ")}
    assert lines.keys() == vitface.__main__.COMMANDS.keys()
    assert re.split(r"\s{3,}", lines["verify"]) == [
        "  vitface verify A.jpg B.jpg",
        "Do two photos show the same person?",
    ]
    for name, line in lines.items():  # each example is one that the command's own parser takes
        _, parser = vitface.__main__.load_command(name)
        parser.parse_args(re.split(r"\s{2,}", line.strip())[0].split()[2:])


@pytest.mark.parametrize("arguments", [["-h"], ["--version"]])
def test_what_needs_no_command(arguments, capsys):
    code, out, err = call(capsys, *arguments)
    assert code == 0 and err == "" and (out == f"vitface {vitface.__version__}\n" or out == call(capsys, "--help")[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "error: unknown command trian; did you mean train?\nsee vitface --help\n"),
        ("xyz --help", "error: unknown command xyz\nsee vitface --help\n"),
    ],
)
def test_an_unknown_command_is_answered_with_the_one_that_was_meant(line, message, capsys):
    assert call(capsys, *line.split()) == (2, "", message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --epoch 3", "unknown flag --epoch; did you mean --epochs?\nsee vitface train --help"),
        ("train --batch_size=8", "unknown flag --batch_size; did you mean --batch-size?\nsee vitface train --help"),
        ("train --xyz 1", "unknown flag --xyz\nsee vitface train --help"),
        ("study tiny --epoch 1", "unknown flag --epoch; did you mean --epochs?\nsee vitface study --help"),
        ("convert clip --sorce x", "unknown flag --sorce; did you mean --src?\nsee vitface convert --help"),
        ("data check x --agianst y", "unknown flag --agianst; did you mean --against?\nsee vitface data check --help"),
        ("verify a b c", "unexpected c\nsee vitface verify --help"),
        ("cluster x --out no/y.csv", "argument --out: no/y.csv: its folder does not exist\nsee vitface cluster --help"),
        ("convert clip", "the following arguments are required: --src\nsee vitface convert --help"),
    ],
)
def test_a_mistake_in_the_flags_is_answered_in_a_line_or_two(line, message, capsys):
    with pytest.raises(SystemExit) as stop:
        call(capsys, *line.split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.startswith(f"error: {message}") and err.count("\n") == 2


def test_words_after_two_dashes_are_no_flags():
    _, parser = vitface.__main__.load_command("verify")
    parsed = parser.parse_args(["--json", "--", "--a.jpg", "--b.jpg"])
    assert (str(parsed.first), str(parsed.second), parsed.json) == ("--a.jpg", "--b.jpg", True)


def test_the_benchmarks_that_can_be_built_are_those_that_build_knows():
    assert tuple(PAIR_LISTS) == data.RELEASES


def test_draw_writes_the_faces_that_the_demo_sees(tmp_path, capsys):
    from vitface.data.synthetic.worlds import SyntheticSamples

    command = ["data", "draw", tmp_path / "faces", "--people", 2, "--images", 3]
    assert call(capsys, *command)[0] == 0
    files = sorted(str(path.relative_to(tmp_path / "faces")) for path in (tmp_path / "faces").rglob("*.jpg"))
    assert files == [f"person-{p:02d}/{i:03d}.jpg" for p in (1, 2) for i in (1, 2, 3)]
    drawn = SyntheticSamples(2, 3).read(4)
    assert np.abs(read_image(tmp_path / "faces" / files[4]).astype(int) - drawn).mean() < 5  # JPEG
    with pytest.raises(SystemExit) as stop:
        call(capsys, *command)
    assert stop.value.code == 2 and "faces exists; name one that does not" in capsys.readouterr().err
