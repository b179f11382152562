"""On real faces and real weights, where they are at hand (see conftest.real_data)."""

import itertools
import json

import numpy as np
import pytest
from conftest import TEST_DATA, optional

import vitface
from vitface.__main__ import main
from vitface.data.formats import published
from vitface.data.formats.pairs import read_bin, write_bin
from vitface.data.formats.samples import RecordSamples
from vitface.evaluation import benchmarks
from vitface.evaluation.benchmarks import category
from vitface.metrics import auc
from vitface.training.holdout import all_pairs


@pytest.fixture(scope="module")
def vit_tiny(tmp_path_factory):
    """The real ViT-Ti/16, converted as the README says."""
    source = TEST_DATA / "vit_tiny_patch16_224_augreg.pth"
    if not source.is_file():
        pytest.skip(f"{source} is absent; set VITFACE_TEST_DATA")
    out = tmp_path_factory.mktemp("weights") / "vit_tiny_patch16.safetensors"
    assert main(["convert", "vit_tiny_patch16", "--src", str(source), "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_frozen_vit_tiny_on_lfw(real_data, vit_tiny, tmp_path):
    command = ["--backbone", "vit_tiny_patch16", "--weights", str(vit_tiny), "--image-size", "112"]
    report = tmp_path / "results.json"
    assert main(["evaluate", *command, "--bench", "lfw", "--data-dir", str(real_data), "--json", str(report)]) == 0
    lfw = json.loads(report.read_text())["benchmarks"]["lfw"]
    assert lfw["accuracy"] == pytest.approx(0.760, abs=0.005)
    assert lfw["pairs"] == 6000


def test_a_few_steps_on_real_faces(real_data, vit_tiny, tmp_path):
    """Real faces from RecordIO as they are, packed elsewhere; cut to four steps."""
    command = ["--backbone", "vit_tiny_patch16", "--weights", str(vit_tiny), "--image-size", "112", "--use-dalora"]
    command += ["--train-data", str(real_data / "celeba289"), "--val-data", str(tmp_path), "--device", "cpu"]
    command += ["--max-samples", "64", "--batch-size", "16", "--epochs", "1", "--save-dir", str(tmp_path / "run")]
    command += ["--holdout-people", "3", "--no-pack", "--num-workers", "0"]
    assert main(["train", *command]) == 0
    model = vitface.load(tmp_path / "run")
    samples = RecordSamples(real_data / "celeba289")
    faces = np.stack([samples.read(i) for i in range(6)])
    embeddings = model.embed(faces)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert embeddings.std(axis=0).max() > 1e-3
    np.testing.assert_allclose(model.domain_weights(faces).sum(axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_photos_are_verified_by_a_model_trained_on_real_faces(real_data, vit_tiny, tmp_path, capsys):
    """Raw photos, detector, alignment, a short LoRA training on 279 people and its own threshold, by the commands.

    Three epochs of the small backbone make a weak recogniser (LFW accuracy in the eighties): that it does far better
    than guessing on 24 photos of 8 people it has not seen is asserted, not that it is right.
    """
    optional("cv2")
    run, photos = tmp_path / "run", sorted((real_data / "raw_faces").glob("*.jpg"))
    command = ["--backbone", "vit_tiny_patch16", "--weights", str(vit_tiny), "--image-size", "112", "--epochs", "3"]
    command += ["--train-data", str(real_data / "celeba289"), "--val-data", str(tmp_path), "--save-dir", str(run)]
    assert main(["train", *command, "--lr", "1e-3", "--scale", "32", "--device", "cpu"]) == 0
    detector = ["--detector", str(real_data / "face_detection_yunet.onnx"), "--checkpoint", str(run)]
    capsys.readouterr()
    answers = {}
    for first, second in itertools.combinations(photos[:9], 2):  # three photos of each of three people
        code = main(["verify", str(first), str(second), "--json", *detector])
        verdict = json.loads(capsys.readouterr().out)
        assert verdict["far"] == 0.01 and code == int(not verdict["same"])
        answers[first, second] = verdict["score"]
    assert main(["embed", str(photos[0].parent), str(tmp_path / "people"), *detector]) == 0
    gallery = vitface.Gallery.load(tmp_path / "people")
    assert gallery.names == [f"raw_faces/{path.name}" for path in photos] and list(gallery.thresholds) == [0.01]
    score = gallery.embeddings @ gallery.embeddings.T
    for (first, second), cosine in answers.items():
        assert cosine == pytest.approx(score[photos.index(first), photos.index(second)], abs=2e-2)  # bf16
    people = np.array([path.name[:-9] for path in photos])
    score, issame = all_pairs(gallery.embeddings, people)
    assert auc(score, issame) > 0.85
    accepted = score >= gallery.thresholds[0.01]
    assert accepted[issame].mean() > 5 * accepted[~issame].mean() and accepted[issame].mean() > 0.2


def test_the_real_sets_are_what_they_claim(real_data):
    pairs = read_bin(real_data / "lfw.bin")
    assert (len(pairs.images), int(pairs.issame.sum())) == (12_000, 3_000)
    samples = RecordSamples(real_data / "celeba289")
    assert (len(samples), len(samples.names)) == (6_071, 289)


@pytest.mark.slow
def test_stand_ins_for_rfw_xqlfw_and_own_pairs(real_data, tmp_path, monkeypatch, capsys):
    """200 pairs of LFW's people each, as four groups, in XQLFW's layout and in a list, through the command."""
    pairs = read_bin(real_data / "lfw.bin")
    folder, crops = tmp_path / "data", tmp_path / "data" / "xqlfw" / "xqlfw_aligned_112"
    folder.mkdir()
    for number, (name, group) in enumerate({**published.RFW, "xqlfw": ""}.items()):
        monkeypatch.setitem(published.PAIRS, name, 200)
        monkeypatch.setitem(benchmarks.BENCHMARKS, name, benchmarks.Benchmark(category(name), 200))
        chosen = np.concatenate([np.arange(600 * fold, 600 * fold + 600, 30) for fold in range(10)]) + number
        images, issame = [pairs.images[2 * i + k] for i in chosen for k in (0, 1)], pairs.issame[chosen]
        if group:
            write_bin(folder / f"{group.title()}_test.bin", images, issame)
            continue
        lines, table, scores = ["10\t10"], ["path1,path2,label"], ["ID\tNum\tScore"]
        for i, same in enumerate(issame):
            first, second = (f"P{i}", 1), (f"P{i}" if same else f"Q{i}", 2)
            for (who, k), image in zip((first, second), images[2 * i : 2 * i + 2], strict=True):
                (crops / who).mkdir(parents=True, exist_ok=True)
                (crops / who / f"{who}_{k:04d}.jpg").write_bytes(image)
                scores.append(f"{who}\t{k}\t{i / 200}")
            lines.append(f"P{i}\t1\t2" if same else f"P{i}\t1\tQ{i}\t2")
            names = [f"{who}/{who}_{k:04d}.jpg" for who, k in (first, second)]
            table.append(f"{names[0]},{names[1]},{int(same)}")
        (crops.parent / "xqlfw_pairs.txt").write_text("\n".join(lines))
        (crops.parent / "xqlfw_scores.txt").write_text("\n".join(scores))
        (crops / "mine.csv").write_text("\n".join(table))
    command = ["evaluate", "--backbone", "vit_nano", "--image-size", "112", "--device", "cpu", "--json"]
    assert main([*command, str(tmp_path / "all.json"), "--bench", "all", "--data-dir", str(folder)]) == 0
    assert main([*command, str(tmp_path / "own.json"), "--bench", str(crops / "mine.csv")]) == 0
    every, own = (json.loads((tmp_path / file).read_text()) for file in ("all.json", "own.json"))
    assert [*every["benchmarks"]] == ["xqlfw", *published.RFW] and every["rfw"]["spread"] > 0
    assert len(every["xqlfw_quality"]) == 3 and own["benchmarks"]["mine.csv"]["published"] is False
    assert own["benchmarks"]["mine.csv"]["accuracy"] == every["benchmarks"]["xqlfw"]["accuracy"] > 0.55
    assert "spread of RFW" in capsys.readouterr().out
