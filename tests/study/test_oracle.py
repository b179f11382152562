"""The studies of an oracle gate: who is judged, on which pairs, which domains the gates are told, and the map."""

import json
import os
import time

import numpy as np
import pytest
import torch
from conftest import tiny_face, tiny_recogniser

from vitface.__main__ import main
from vitface.data.formats.samples import FolderSamples
from vitface.data.synthetic.worlds import SyntheticSamples
from vitface.errors import ConfigError
from vitface.evaluation.protocol import verify
from vitface.lock import waiting_lock
from vitface.study import oracle, strangers
from vitface.study.controls import known_gate, known_gate_shuffled, uniform_gate
from vitface.study.map import groups, lead, map_rows
from vitface.study.strangers import EDGES, fixed_domain, judged_by_yaw, keep_people_back, pairs_of_strangers
from vitface.training import setup

STUDY = ["--backbone", "tiny", "--weights", "random", "--image-size", "32", "--head-levels", "1", "--router-depth", "1"]
STUDY += ["--train-data", "synthetic", "--epochs", "1", "--batch-size", "8", "--lora-rank", "2", "--dtype", "fp32"]


@pytest.fixture
def few_faces(monkeypatch, tiny_preset):
    """16 synthetic people with 4 photos each, of whom 4 are judged."""
    monkeypatch.setattr(setup, "SYNTHETIC_PEOPLE", 16)
    monkeypatch.setattr(setup, "SYNTHETIC_IMAGES", 4)
    monkeypatch.setattr(oracle, "MOST_PAIRS", 20)


def test_a_known_gate_is_one_for_the_known_domain_and_zero_for_all_others():
    images = torch.rand(4, 3, 32, 32)
    model, domains = tiny_face(num_domains=3), torch.tensor([2, 0, 1, 2])
    known_gate(model)
    assert torch.equal(model(images, domains).weights, torch.eye(3)[domains])
    model.router.domain = 1
    assert torch.equal(model(images).weights, torch.eye(3)[[1, 1, 1, 1]])
    assert not any(name.startswith("router") for name, p in model.named_parameters() if p.requires_grad)
    shuffled = tiny_face(num_domains=3)
    known_gate_shuffled(shuffled)
    assert torch.equal(shuffled(images, domains).weights, torch.eye(3)[domains[[3, 0, 1, 2]]])


def test_only_the_adapter_of_the_known_domain_learns():
    model = tiny_face(num_domains=3)
    known_gate(model)
    model(torch.rand(4, 3, 32, 32), torch.tensor([0, 2, 2, 0])).embedding.square().sum().backward()
    gradients = [p.grad.unflatten(1, (3, -1)) for n, p in model.named_parameters() if n.endswith("lora_b")]
    assert gradients and all(not g[:, 1].any() for g in gradients) and all(g[:, [0, 2]].any() for g in gradients)


def test_a_uniform_gate_is_wide_lora_at_a_third_of_the_scale():
    gated, wide = tiny_face(num_domains=3, lora_rank=4, lora_alpha=8.0), tiny_face(lora_rank=12, lora_alpha=8.0)
    uniform_gate(gated)
    state = {name: tensor for name, tensor in gated.state_dict().items() if not name.startswith("router")}
    wide.load_state_dict(state)
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(gated(images).embedding, wide(images).embedding, rtol=1e-5, atol=1e-6)


def test_people_are_judged_or_train_and_photos_stay_as_they_are(tmp_path):
    samples = SyntheticSamples(16, 2)
    keep_people_back(samples, tmp_path, 5)
    folders = {name: FolderSamples(tmp_path / name) for name in ("train", "train-5", "judged")}
    names = {name: set(folder.names) for name, folder in folders.items()}
    assert len(names["judged"]) == 4 and len(names["train"]) == 12 and len(names["train-5"]) == 5
    assert names["train-5"] < names["train"] and not names["train"] & names["judged"]
    judged = folders["judged"]
    first = judged.image_names()[0]
    np.testing.assert_array_equal(judged.read(0), samples.read(int(first.partition("/")[2][:-4])))
    assert int(first.partition("/")[0]) == samples.labels[int(first.partition("/")[2][:-4])]


def test_pairs_are_of_both_sides_never_twice_and_half_of_them_same():
    rng = np.random.default_rng(0)
    labels, first, second = np.repeat(np.arange(6), 5), rng.random(30) < 0.6, rng.random(30) < 0.6
    i, j, same = pairs_of_strangers(labels, first, second, 1000, 3)
    assert first[i].all() and second[j].all() and (same == (labels[i] == labels[j])).all()
    assert len({frozenset(pair) for pair in zip(i.tolist(), j.tolist(), strict=True)}) == len(i)
    assert (i != j).all() and same.sum() * 2 == len(same)
    every = {
        frozenset((a, b))
        for a in range(30)
        for b in range(30)
        if a != b and labels[a] == labels[b] and first[a] and second[b]
    }
    assert same.sum() == len(every)  # there are more different pairs
    assert len(pairs_of_strangers(labels, first, second, 7, 3)[0]) == 14


def test_faces_that_are_turned_far_meet_frontal_ones(tmp_path, monkeypatch):
    keep_people_back(SyntheticSamples(16, 6), tmp_path, 5)
    degrees = iter([2.0, 29.0, 31.0, 45.0, 14.0, None] * 4)

    def landmarks(crop, detector):
        angle = next(degrees)
        return None if angle is None else np.full((5, 2), angle)

    monkeypatch.setattr(strangers, "crop_landmarks", landmarks)
    monkeypatch.setattr(strangers, "yaw_degrees", lambda points: -points[:, 0, 0])
    strangers.label_yaw(tmp_path / "judged", object())
    judged = judged_by_yaw(tmp_path / "judged", 100)
    np.testing.assert_array_equal(judged.domains, [0, 1, 2, 2, 0, 2] * 4)
    assert EDGES == (15, 30)
    i, j, same = judged.pairs["frontal-far"]
    assert set(i % 6) == {0, 4} and set(j % 6) == {2, 3} and same.sum() == 4 * 2 * 2
    assert set(judged.pairs["far"][0] % 6) | set(judged.pairs["far"][1] % 6) == {2, 3}


def result(distance, people):
    people = np.array(people)
    return verify(np.array(distance, float), people[:, 0] == people[:, 1], np.arange(len(people)) % 2)


def test_a_lead_is_that_of_the_accuracies_and_sure_only_if_people_agree():
    rng = np.random.default_rng(1)
    people = np.stack([np.repeat(np.arange(20), 20), np.repeat(np.arange(20), 20)], axis=1)
    people[::2, 1] = (people[::2, 0] + rng.integers(1, 20, 200)) % 20
    same = people[:, 0] == people[:, 1]

    def side(spread, whom):
        distance = np.where(same, 1.0, 3.0) + rng.normal(size=400) * np.where(np.isin(people[:, 0], whom), spread, 0.1)
        found = verify(distance.clip(0, 4), same)
        return {"plain": type(found)(**{**vars(found), "people": people})}

    good = [side(0.1, []) for _ in range(3)]
    bad = [side(3.0, np.arange(20)) for _ in range(3)]
    one_person = [side(3.0, [4]) for _ in range(3)]
    difference, (low, high) = lead(good, bad, ["plain"])
    means = [np.mean([r["plain"].accuracy for r in runs]) for runs in (good, bad)]
    assert difference == pytest.approx(means[0] - means[1]) and low < difference < high and low > 0.05
    difference, (low, high) = lead(good, one_person, ["plain"])
    assert difference > 0.005 and low < 0.002  # a bootstrap over pairs would be sure
    assert lead(good, good, ["plain"]) == (0, (pytest.approx(0, abs=1e-15), pytest.approx(0, abs=1e-15)))
    rows = map_rows({"base": {"oracle": dict(enumerate(good)), "lora": {0: bad[0], 7: bad[1]}}})
    assert rows[0]["lead"] == {} and rows[1]["lead"]["all"]["seeds"] == [0] and rows[1]["seeds"] == [0, 7]


def test_columns_of_the_map():
    assert groups(["plain", "nir", "plain-nir", "blur", "plain-blur"]) == {
        "plain": ["plain"],
        "same sensor": ["nir", "blur"],
        "plain against sensor": ["plain-nir", "plain-blur"],
        "all": ["plain", "nir", "plain-nir", "blur", "plain-blur"],
    }
    assert groups(["frontal", "far"]) == {"frontal": ["frontal"], "far": ["far"], "all": ["frontal", "far"]}


def test_photos_are_embedded_with_the_domain_that_is_known_of_them():
    model, domains = tiny_recogniser(num_domains=3), np.array([2, 0, 2, 1])
    crops = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), np.uint8)
    known_gate(model.model)
    rows = oracle.embed_known(model, crops, domains)
    for image, domain in enumerate(domains.tolist()):
        model.model.router.domain = domain
        np.testing.assert_allclose(rows[image], model.embed(crops[image : image + 1])[0], atol=1e-5)


def test_the_sensors_are_studied_once_and_mapped(tmp_path, few_faces, monkeypatch, capsys):
    folder = tmp_path / "map"
    command = ["study", "sensors", *STUDY, "--degrade", "lowres:16,nir", "--save-dir", str(folder), "--seeds", "0"]
    some = ["--settings", "base", "--variants", "oracle", "lora_wide", "fixed", "shuffled", "dalora_labelled"]
    assert main([*command, *some]) == 0
    kept = json.loads((folder / "map.json").read_text())
    assert [row["arm"] for row in kept["rows"]] == ["oracle", "lora_wide", "shuffled", "fixed", "dalora_labelled"]
    assert list(kept["rows"][1]["lead"]) == ["plain", "same sensor", "plain against sensor", "all"]
    settings = json.loads((folder / "base" / "oracle-s0" / "config.json").read_text())
    assert settings["num_domains"] == 3 and settings["domain_labels"] is None
    wide = json.loads((folder / "base" / "lora_wide-s0" / "config.json").read_text())
    assert (wide["lora_rank"], wide["lora_alpha"], wide["use_dalora"]) == (6, 48.0, False)
    assert "| base | lora_wide | 0 |" in (folder / "map.md").read_text()
    assert "base: over lora_wide" in (folder / "map.svg").read_text()

    def never(*arguments, **named):
        raise AssertionError("trained or judged again")

    monkeypatch.setattr("vitface.training.run.Trainer", never)
    monkeypatch.setattr(oracle.OracleStudy, "results", never)
    assert main([*command, *some]) == 0
    assert json.loads((folder / "map.json").read_text())["rows"] == kept["rows"]
    assert main([*command, "--holdout-people", "4"]) == 2
    assert "keeps people of its own back; --holdout-people must be 0" in capsys.readouterr().err
    assert main([*command, "--variants", "lora48"]) == 2
    assert "unknown variant 'lora48'; known: oracle, lora_wide" in capsys.readouterr().err
    assert main([*command, "--settings", "ranks"]) == 2
    assert "unknown setting 'ranks'; known: base, epochs_3" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_process_prepares_a_study_at_a_time(tmp_path, few_faces, monkeypatch, capsys):
    folder = tmp_path / "map"
    folder.mkdir()
    pid = os.fork()
    if not pid:
        with waiting_lock(folder / ".lock"):
            (tmp_path / "locked").touch()
            time.sleep(0.3)
            (tmp_path / "released").touch()
            os._exit(0)
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)

    def prepare(study):
        assert (tmp_path / "released").exists()
        raise ConfigError("seen")

    monkeypatch.setattr(oracle.OracleStudy, "prepare", prepare)
    assert main(["study", "sensors", *STUDY, "--save-dir", str(folder)]) == 2
    assert capsys.readouterr().err == "error: seen\n"
    os.waitpid(pid, 0)


def test_fixed_domains_depend_on_the_name_and_are_even():
    counts = np.bincount([fixed_domain(f"{n}.png", 4) for n in range(4000)])
    np.testing.assert_allclose(counts / 4000, 0.25, atol=0.03)
    assert fixed_domain("a.png", 4) == fixed_domain("a.png", 4)
