"""TinyFace: against the definition, written from the paper's; and from folders as the release has them to results."""

import json

import numpy as np
import pytest
from drawn import drawn_faces, jpeg
from PIL import Image

from vitface.__main__ import main
from vitface.commands.evaluate import benchmark_names
from vitface.data.formats import tinyface_folder
from vitface.data.formats.tinyface_folder import TinyFace, find_tinyface, read_tinyface
from vitface.errors import CheckpointError, DataError, EvaluationError
from vitface.evaluation.ijb.results import kept_results
from vitface.evaluation.tinyface import search_ranks

PICTURES = [jpeg(crop) for crop in drawn_faces(people=6, images=8)]


def simulated(seed, people=30, strangers=200, width=8):
    """Faces with few distinct embeddings, so that many tie; some probes have several photos, and one has none."""
    rng = np.random.default_rng(seed)
    person = np.concatenate([rng.integers(0, people, 60), rng.integers(0, people, 40), np.full(strangers, -1)])
    probe = np.repeat([False, True, False], [60, 40, strangers])
    person[60] = 999
    own = rng.integers(-1, 2, (people, width))[np.minimum(person, people - 1)]
    rows = np.where(rng.random((len(person), width)) < 0.4, rng.integers(-1, 2, (len(person), width)), own).astype("f4")
    rows[person < 0] = rng.integers(-1, 2, (strangers, width))
    rows[~rows.any(axis=1)] = 1
    scale = rng.uniform(0.5, 2, (len(rows), 1)).astype("f4")
    return TinyFace(None, [""] * len(person), person, probe), rows * scale


def by_definition(faces, rows, rank):
    """Each probe: sort the gallery by cosine, strangers first among equals, and look for its person in the first k."""
    unit = [row.astype(float) / np.sqrt((row.astype(float) ** 2).sum()) for row in rows]
    hits = []
    for i in np.flatnonzero(faces.probe):
        gallery = [j for j in range(len(rows)) if not faces.probe[j]]
        if faces.person[i] not in [faces.person[j] for j in gallery]:
            continue
        best_first = sorted(
            gallery, key=lambda j: (-round(float(unit[i] @ unit[j]), 9), faces.person[j] == faces.person[i])
        )
        hits.append(faces.person[i] in [faces.person[j] for j in best_first[:rank]])
    return np.mean(hits)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_those_of_the_definition(seed, monkeypatch):
    monkeypatch.setattr("vitface.evaluation.ijb.scoring.PRODUCT", 1000)  # several blocks
    faces, rows = simulated(seed)
    found = search_ranks(faces, np.array_split(rows, 3))
    assert list(found) == [1, 5, 10, 20] and 0 < found[5] < found[20]
    for rank, share in found.items():
        assert share == pytest.approx(by_definition(faces, rows, rank), abs=1e-9)
    assert "have nobody in Gallery_Match and do not count" in faces.alarms[-1]


def test_nobody_is_in_the_gallery():
    faces, rows = simulated(0)
    faces.person[faces.probe] += 1000
    with pytest.raises(EvaluationError, match="no probe is of a person in Gallery_Match"):
        search_ranks(faces, [rows])


def release(folder, aligned=True):
    """Six people: a photo each as probe, two in the gallery; ten distractors, five of them in a folder."""
    for number in range(6):
        for part, images in (("Probe", [0]), ("Gallery_Match", [1, 2])):
            (folder / part).mkdir(parents=True, exist_ok=True)
            for image in images:
                (folder / part / f"{number + 1}_{image}.jpg").write_bytes(PICTURES[8 * number + image])
    (folder / "Gallery_Distractor" / "more").mkdir(parents=True)
    for number in range(10):
        place = "more/" * (number % 2)
        (folder / "Gallery_Distractor" / f"{place}x{number}.jpg").write_bytes(PICTURES[4 * number + 3])
    if not aligned:
        Image.open(folder / "Probe" / "1_0.jpg").resize((14, 20)).save(folder / "Probe" / "1_0.jpg")
    return folder


@pytest.mark.parametrize("place", ["", "TinyFace", "tinyface/Testing_Set", "tinyface/tinyface/Testing_Set"])
def test_folders(tmp_path, place):
    found = read_tinyface(tmp_path) if release(tmp_path / place) else None
    assert found.folder == tmp_path / place and len(found.crops) == 28
    assert found.probe.sum() == 6 and (found.person == -1).sum() == 10
    assert found.crops[:2] == ["Gallery_Match/1_1.jpg", "Gallery_Match/1_2.jpg"] and found.person[0] == 1
    assert found.alarms == [
        "tinyface: 12, 6, 10 photos in Gallery_Match, Probe, Gallery_Distractor; the published set has 4,443, 3,728, "
        "153,428: its figures are not comparable"
    ]


def test_aligned_crops_come_first(tmp_path, monkeypatch):
    release(tmp_path / "tinyface" / "Testing_Set", aligned=False)
    monkeypatch.setattr(tinyface_folder, "TINYFACE", (12, 6, 10))
    (alarm,) = read_tinyface(tmp_path).alarms
    assert alarm.startswith("tinyface: 1 of 28 images looked at are no 112 x 112 crops: enlarged as they are")
    crop = read_tinyface(tmp_path).read(12)
    assert crop.shape == (112, 112, 3) and not crop[:, :8].any() and crop[:, 30:80].any()  # 14 x 20 in a square
    release(tmp_path / "tinyface" / "aligned_pad_0.1_pad_high")
    assert find_tinyface(tmp_path).name == "aligned_pad_0.1_pad_high" and read_tinyface(tmp_path).alarms == []
    assert find_tinyface(tmp_path / "no") is None


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tinyface has no Gallery_Match; docs/benchmarks.md"):
        read_tinyface(tmp_path)
    folder = release(tmp_path / "tinyface")
    (folder / "Probe" / "anna.jpg").write_bytes(PICTURES[0])
    with pytest.raises(DataError, match=r"Probe/anna.jpg: its name does not begin with the number of a person"):
        read_tinyface(tmp_path)
    (folder / "Gallery_Distractor").rename(folder / "Distractors")
    (folder / "Probe" / "anna.jpg").unlink()
    with pytest.raises(DataError, match="Gallery_Distractor is missing, or has no image"):
        read_tinyface(tmp_path)


def test_from_folders_to_results(tmp_path, tiny_run, capsys):
    release(tmp_path / "data" / "tinyface")
    command = [
        "evaluate",
        "--checkpoint",
        str(tiny_run),
        "--device",
        "cpu",
        "--bench",
        "tinyface",
        "--num-workers",
        "0",
    ]
    command += ["--data-dir", str(tmp_path / "data")]
    assert main([*command, "--dry-run"]) == 0 and "28 of 28 faces to embed" in capsys.readouterr().out
    files = ["--json", str(tmp_path / "out.json"), "--output", str(tmp_path / "out.html")]
    assert main([*command, *files]) == 0
    out, err = capsys.readouterr()
    entry = json.loads((tmp_path / "out.json").read_text())["benchmarks"]["tinyface"]
    assert (entry["probes"], entry["gallery"], entry["distractors"]) == (6, 12, 10) and list(entry["rank"]) == [
        "1",
        "5",
        "10",
        "20",
    ]
    assert f"rank-1 {100 * entry['rank']['1']:.2f}  rank-5" in out and "ALARM tinyface: 12, 6, 10 photos" in err
    assert "rank-1" in (tmp_path / "out.html").read_text() and kept_results(tiny_run, "tinyface") == {"": entry}
    assert main(["evaluate", "--bench", "tinyface", "--compare", str(tiny_run)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["rank-1", "rank-5", "rank-10", "rank-20"]
    assert main(["info", str(tiny_run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["benchmarks"]["tinyface"]
    assert told == {f"rank-{k}": share for k, share in entry["rank"].items()}
    (tiny_run / "tinyface.json").write_text('{"model": "x", "results": {"": {"rank": {"1": 7}}}}')
    with pytest.raises(CheckpointError, match="is not of the run's best checkpoint|is damaged"):
        kept_results(tiny_run, "tinyface")
    assert main([*command, "--routing"]) == 2 and "pairs of photos; tinyface has none" in capsys.readouterr().err
    with pytest.raises(DataError, match="no benchmark was found"):
        benchmark_names("all", tmp_path / "data")
    assert "not in 'all', as it takes long: --bench tinyface" in capsys.readouterr().out
