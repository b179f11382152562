"""IJB's protocols against the papers' definitions, pair by pair (tests/ijb.py); the command, from crops to results."""

import json

import numpy as np
import pytest
from conftest import optional
from drawn import drawn_faces, jpeg
from ijb import reference, write_ijb

from vitface.__main__ import main
from vitface.data.faces.alignment import align_face
from vitface.data.formats.ijb_lists import read_faces, read_protocol
from vitface.data.formats.published import MODES
from vitface.data.images import read_image
from vitface.errors import EvaluationError
from vitface.evaluation.ijb import embedding, scoring
from vitface.evaluation.ijb.results import result_text
from vitface.evaluation.ijb.scoring import evaluate_templates, pair_scores, tar_at_far
from vitface.recogniser import load

metrics = optional("sklearn.metrics")


def check(result, wanted):
    assert result["tar_at_far"] == pytest.approx({f"{far:g}": rate for far, rate in wanted["tar"].items()}, abs=1e-9)
    assert result["auc"] == pytest.approx(wanted["auc"], abs=1e-9)
    assert [*result["searches"]] == [kind[-2:] for kind in wanted["rank"]] + ["mean"]
    for kind in wanted["rank"]:
        rates = {f"rank-{k}": rate for k, rate in wanted["rank"][kind].items()}
        rates |= {f"TPIR@{far:g}": rate for far, rate in wanted["tpir"][kind].items()}
        found = result["searches"][kind[-2:]]
        assert {rate: found[rate] for rate in rates} == pytest.approx(rates, abs=1e-9)
    a, b, _ = result["searches"]
    means = {rate: (result["searches"][a][rate] + result["searches"][b][rate]) / 2 for rate in rates}
    assert result["searches"]["mean"] == pytest.approx(means, abs=1e-12)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.endswith("F1")])
@pytest.mark.parametrize("name", ["ijbb", "ijbc"])
@pytest.mark.parametrize("values", ["normal", "few"])
def test_rates_are_those_of_the_definitions(tmp_path, monkeypatch, name, mode, values):
    monkeypatch.setattr(scoring, "PRODUCT", 50)  # several blocks
    checked = 0
    for seed in range(6):
        home = write_ijb(tmp_path / str(seed), name, people=8, seed=seed)
        faces = read_faces(name, tmp_path / str(seed))
        protocol = read_protocol(faces)
        rng, person = np.random.default_rng(seed), faces.row % 5
        rows = rng.normal(size=(len(faces.crops), 4)) + rng.normal(size=(5, 4))[person]
        if values == "few":  # of which many templates are equal, or opposite
            rows = rng.choice([[1, 0, 0], [0, 2, 0], [0, -2, 0], [3, 4, 0], [0, 0, 1]], len(rows))
        rows = rows.astype(np.float32)
        wanted = reference(home, rows, mode)
        if wanted["auc"] < 0.46:
            continue
        check(evaluate_templates(faces, protocol, [rows[:9], rows[9:10], rows[10:]], mode), wanted)
        checked += 1
    assert checked >= 4


def test_ties_and_empty_templates_are_in_the_sets(tmp_path):
    write_ijb(tmp_path)
    faces = read_faces("ijbc", tmp_path)
    templates = scoring.pool(faces, [np.ones((len(faces.crops), 3), np.float32)], "N1D1F1")
    norms = np.linalg.norm(templates, axis=1)
    assert sorted(np.unique(norms.round(12))) == [0, 1] and (norms == 0).sum() == 1


def test_rates_against_scikit_learn():
    rng = np.random.default_rng(0)
    same, different = rng.normal(1, 1, 500).round(2), np.sort(rng.normal(0, 1, 5000).round(2))
    far, tar, _ = metrics.roc_curve(np.repeat([1, 0], [500, 5000]), [*same, *different], drop_intermediate=False)
    for rate in (1e-4, 1e-3, 1e-2, 0.1, 0.5, 1):
        assert tar_at_far(same, different, rate) == tar[far <= rate + 1e-12].max()


@pytest.mark.parametrize("count", [1, 2, 400])
def test_scores_of_pairs_in_any_order(monkeypatch, count):
    monkeypatch.setattr(scoring, "PRODUCT", 300)
    rng = np.random.default_rng(count)
    templates, pairs = rng.normal(size=(90, 7)), rng.integers(0, 90, (count, 2)).astype(np.int32)
    np.testing.assert_allclose(pair_scores(templates, pairs), (templates[pairs[:, 0]] * templates[pairs[:, 1]]).sum(1))


def test_inverted_labels_are_an_error_and_few_false_accepts_are_marked(tmp_path):
    home = write_ijb(tmp_path)
    faces = read_faces("ijbc", tmp_path)
    path = home / "meta" / "ijbc_template_pair_label.txt"
    pairs = np.loadtxt(path, int)
    people = np.random.default_rng(0).normal(size=(len(faces.templates), 16))
    protocol, of = read_protocol(faces), np.zeros(len(people), int)
    for found in protocol.lists:
        of[found.rows] = found.subjects % 100
    rows = people[of[faces.row]].astype(np.float32)
    result = evaluate_templates(faces, protocol, [rows], "N1D0F1")
    text = result_text("ijbc", result)
    assert "100.00*" in text and "fewer than 30" in text and result["searches"]["mean"]["rank-1"] == 1
    np.savetxt(path, np.column_stack([pairs[:, :2], 1 - pairs[:, 2]]), "%d")
    protocol = read_protocol(faces)
    assert "label.txt: line 1: " in protocol.alarms[0] and "labels are not what the subjects" in protocol.alarms[0]
    with pytest.raises(EvaluationError, match="inverted"):
        evaluate_templates(faces, protocol, [rows], "N1D0F1")


@pytest.fixture
def command(tmp_path, monkeypatch, tiny_run):
    """`command(...)` evaluates the tiny run on a set of drawn faces in parts of ten, with a cache of its own."""
    monkeypatch.setenv("VITFACE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(embedding, "PART", 10)
    drawn = drawn_faces(people=6, images=8)

    def crop(person, number):
        larger = np.full((150, 150, 3), 90, np.uint8)
        larger[20:132, 20:132] = drawn[person * 8 + number % 8]
        return jpeg(larger)

    home = write_ijb(tmp_path / "data" / "IJB_release", crops=crop)
    words = ["evaluate", "--bench", "ijbc", "--checkpoint", tiny_run, "--data-dir", tmp_path / "data"]
    words += ["--num-workers", 0, "--device", "cpu"]
    return lambda *more: main([str(word) for word in (*words, *more)]), home, tiny_run


@pytest.mark.parametrize("mode", ["N1D1F1", "N0D0F0"])
def test_the_command_from_crops_to_the_results_file(command, tmp_path, mode, capsys):
    run, home, tiny_run = command
    assert run("--pooling", mode, "--json", tmp_path / "r.json", "--output", tmp_path / "r.html") == 0
    out, err = capsys.readouterr()
    model = load(tiny_run, dtype="fp32").model
    lines = [line.split() for line in (home / "meta" / "ijbc_name_5pts_score.txt").read_text().splitlines()]
    crops = np.stack(
        [
            align_face(read_image(home / "loose_crop" / name), np.array(points[:10], float).reshape(5, 2))
            for name, *points in lines
        ]
    )
    rows = model.embed_tokens(model.tokens(embedding.torch.from_numpy(crops))).embedding
    if mode == "N1D1F1":
        rows = rows + model.embed_tokens(model.tokens(embedding.torch.from_numpy(crops[:, :, ::-1].copy()))).embedding
    wanted = reference(home, rows.detach().numpy(), mode)
    entry = json.loads((tmp_path / "r.json").read_text())["benchmarks"]["ijbc"]
    assert entry["tar_at_far"] == {f"{far:g}": pytest.approx(rate, abs=1e-9) for far, rate in wanted["tar"].items()}
    kept = json.loads((tiny_run / "ijbc.json").read_text())["results"]
    assert kept == {mode: entry} and entry["faces"] == len(lines)
    assert f"ijbc {mode}: {len(lines):,} faces" in out and "TAR at FAR" in (tmp_path / "r.html").read_text()
    assert "its figures are not comparable" in err


def test_a_stopped_embedding_goes_on(command, tmp_path, monkeypatch, capsys):
    run, home, tiny_run = command
    (home / "loose_crop" / "25.jpg").rename(tmp_path / "aside.jpg")
    (home / "loose_crop" / "25.jpg").write_bytes(b"\xff\xd8\xffcut")
    assert run() == 2
    assert "25.jpg: damaged" in capsys.readouterr().err
    (tmp_path / "aside.jpg").replace(home / "loose_crop" / "25.jpg")
    parts = sorted((tmp_path / "home" / "ijbc").glob("*/part-*"))
    assert [part.name[:12] for part in parts] == ["part-000000-", "part-000001-"]
    assert all(part.stat().st_mode & 0o777 == 0o600 for part in parts)
    parts[0].write_bytes(parts[0].read_bytes()[:-3])  # damaged by a full disk, as may be
    seen, read = [], embedding._read_part
    monkeypatch.setattr(embedding, "_read_part", lambda faces, number: seen.append(number) or read(faces, number))
    assert run("--dry-run") == 0
    assert "faces to embed: about" in capsys.readouterr().out and seen == []
    assert run() == 0
    assert seen == [0, *range(2, -(-len(list(home.glob("loose_crop/*"))) // 10))]
    first = capsys.readouterr().out
    assert run("--pooling", "N0D1F1") == 0 and run() == 0
    assert seen[-1] == max(seen) and capsys.readouterr().out.endswith(first)
    assert sorted(json.loads((tiny_run / "ijbc.json").read_text())["results"]) == ["N0D1F1", "N1D1F1"]
    (home / "loose_crop" / "11.jpg").write_bytes((home / "loose_crop" / "1.jpg").read_bytes())
    assert run() == 0 and seen[-2:] == [max(seen), 1] and len(list(parts[0].parent.iterdir())) == 1 + max(seen)


def test_runs_are_compared_by_what_they_kept(command, tmp_path, capsys):
    run, _, tiny_run = command
    assert main(["evaluate", "--compare", str(tiny_run), "--bench", "ijbc"]) == 2
    assert (
        "ijbc.json is missing; evaluate the run again with\n  vitface evaluate --checkpoint" in capsys.readouterr().err
    )
    assert run() == run("--pooling", "N0D1F1") == 0
    capsys.readouterr()
    assert main(["evaluate", "--compare", str(tiny_run), "--bench", "ijbc", "--json", str(tmp_path / "c.json")]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    entry = json.loads((tmp_path / "c.json").read_text())["runs"][str(tiny_run)]["N1D1F1"]
    assert first.split()[0] == "N1D1F1" and second.split()[0] == "N0D1F1" and first.endswith(str(tiny_run))
    assert first.split()[6] == f"{100 * entry['tar_at_far']['0.1']:.2f}" and head.split()[5:7] == [
        "TAR@1e-01",
        "rank-1",
    ]
    assert main(["info", str(tiny_run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["benchmarks"]
    assert (
        list(told) == ["ijbc N1D1F1", "ijbc N0D1F1"] and told["ijbc N1D1F1"]["TAR@1e-01"] == entry["tar_at_far"]["0.1"]
    )
    assert main(["info", str(tiny_run)]) == 0
    rate = entry["searches"]["mean"]["rank-1"]
    assert f", rank-1 {100 * rate:.2f} %, rank-5 " in capsys.readouterr().out
    (tiny_run / "ijbc.json").write_text('{"model": "x", "results": {"N9": {}}}')
    assert main(["evaluate", "--compare", str(tiny_run), "--bench", "ijbc"]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert main(["info", str(tiny_run)]) == 0 and "ijbc.json is damaged" in capsys.readouterr().err


def test_embeddings_that_are_all_equal_are_an_error(tmp_path):
    write_ijb(tmp_path)
    faces = read_faces("ijbc", tmp_path)
    with pytest.raises(EvaluationError, match="equal"):
        evaluate_templates(faces, read_protocol(faces), [np.ones((len(faces.crops), 3), np.float32)], "N1D0F1")


def test_a_gallery_that_knows_all_probes_has_no_false_positive_rate(tmp_path):
    write_ijb(tmp_path)
    faces = read_faces("ijbc", tmp_path)
    first, second, probes = read_protocol(faces).lists
    known = np.isin(probes.subjects, first.subjects)
    own = scoring.Gallery("own", probes.rows[known], probes.subjects[known])
    templates = np.random.default_rng(0).normal(size=(len(faces.templates), 8))
    found = scoring.search(templates, first, own)
    assert found["unmated"] == 0 and found["TPIR@0.01"] is None and 0 <= found["rank-1"] <= found["rank-10"] == 1
    with pytest.raises(EvaluationError, match="no probe is of a person in own"):
        scoring.search(templates, own, second)


def test_what_goes_with_pairs_only(command, capsys):
    assert command[0]("--show-faces") == 2
    assert "are for pairs of photos; ijbc has none" in capsys.readouterr().err
