import json

import numpy as np
import pytest
from conftest import tiny_face

import vitface
from vitface.__main__ import main
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.metrics import roc
from vitface.recogniser import Recogniser
from vitface.store.faces import open_checkpoint
from vitface.training import holdout, setup
from vitface.training.holdout import all_pairs, embed_held_out


def test_scores_of_all_pairs():
    samples, model = SyntheticSamples(3, 3), tiny_face()
    held_out = np.array([0, 1, 4, 8])
    embeddings, gates, people = embed_held_out(model, samples, held_out)
    assert (gates == 1).all() and gates.shape == (4, 1)
    score, issame = all_pairs(embeddings, people)
    rows = Recogniser(model).embed(samples.render(held_out), flip=False)
    expected = [
        (rows[i] @ rows[j], samples.labels[held_out[i]] == samples.labels[held_out[j]])
        for i in range(4)
        for j in range(i + 1, 4)
    ]
    np.testing.assert_allclose(score, [cosine for cosine, _ in expected], atol=1e-6)
    assert issame.tolist() == [same for _, same in expected] and issame.sum() == 1


def test_a_run_calibrates_its_thresholds_and_load_reads_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "SYNTHETIC_PEOPLE", 24)
    monkeypatch.setattr(setup, "SYNTHETIC_IMAGES", 5)
    command = ["--backbone", "vit_nano", "--image-size", "112", "--train-data", "synthetic", "--max-samples", "8"]
    command += ["--val-data", str(tmp_path), "--epochs", "1", "--batch-size", "8", "--holdout-people", "16"]
    command += ["--num-workers", "0", "--device", "cpu", "--head", "bn", "--save-dir", str(tmp_path / "run")]
    monkeypatch.setattr("vitface.training.finish.final_benchmarks", lambda config: [])
    assert main(["train", *command]) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "run" / "thresholds.json").read_text())
    assert written["pairs"] == {"same": 16 * 10, "different": 80 * 79 // 2 - 160}
    assert written["model"] == open_checkpoint(tmp_path / "run").sha256
    assert "needs 30,000 different pairs, there are 3,000" in written["thresholds"]["0.001"]["refused"]
    kept = written["thresholds"]["0.01"]
    text = (
        "thresholds on the cosine, from 160 same and 3,000 different pairs held out\n"
        f"  FAR 0.01: {kept['threshold']:.4f}, accepts {100 * kept['tar']:.2f} % of same pairs\n"
        "  FAR 0.001: not enough pairs (FAR=0.001 needs 30,000 different pairs, there are 3,000)\n"
    )
    assert text in printed and text in (tmp_path / "run" / "results.md").read_text()
    checkpoint = open_checkpoint(tmp_path / "run")
    model = Recogniser.from_checkpoint(checkpoint).prepare()  # as the commands use it
    assert list(model.thresholds) == [0.01]
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr("vitface.store.thresholds.far_threshold", lambda *given: seen.append(given) or (0.0, 0.0))
        saved = json.loads((tmp_path / "run" / "config.json").read_text())
        data = setup.open_data(vitface.config.TrainConfig(**saved))
        holdout.calibrate(data, checkpoint, model.model)
    far, tar, thresholds = roc(*seen[0][:2])
    allowed = thresholds[far <= 0.01].min()
    assert model.thresholds[0.01] == pytest.approx(allowed, abs=1e-6)
    assert written["thresholds"]["0.01"]["tar"] == pytest.approx(tar[far <= 0.01].max(), abs=1e-6)
    written["model"] = "of another checkpoint"
    (tmp_path / "run" / "thresholds.json").write_text(json.dumps(written))
    assert vitface.load(tmp_path / "run").thresholds == {}
    (tmp_path / "run" / "thresholds.json").write_text("{")
    capsys.readouterr()
    assert vitface.load(tmp_path / "run").thresholds == {}
    assert "thresholds.json is damaged" in capsys.readouterr().err
