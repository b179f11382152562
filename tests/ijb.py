"""IJB sets in the official layout, of any size; and the papers' protocols, computed pair by pair from the files."""

import csv
import itertools
from collections import defaultdict

import numpy as np

TEMPLATE = [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
LISTS = {"ijbc": ("gallery_G1", "gallery_G2", "probe_mixed"), "ijbb": ("gallery_S1", "gallery_S2", "probe_mixed")}


def write_ijb(root, name="ijbc", people=6, seed=0, crops=None):
    """Writes the files and returns their folder; a person has a template in a gallery and two among the probes.

    A template has one to three media of one to three faces. Some faces have the detector's score 0, in one template
    all. `crops` gives the bytes of a crop by the numbers of its person and face.
    """
    rng = np.random.default_rng(seed)
    home = root / name.upper()
    (home / "loose_crop").mkdir(parents=True)
    (home / "meta").mkdir()
    faces, rows = [], {kind: [] for kind in LISTS[name]}
    templates = [(person, kind) for person in range(people) for kind in (person % 2, 2, 2)]
    ids = (7 + 3 * rng.permutation(len(templates))).tolist()
    for (person, kind), template in zip(templates, ids, strict=True):
        for media in rng.choice(99, rng.integers(1, 4), replace=False).tolist():
            for _ in range(rng.integers(1, 4)):
                score = 0.0 if template == ids[-1] or rng.random() < 0.1 else round(float(rng.uniform(0.3, 1)), 3)
                faces.append((template, media, person, score))
                rows[LISTS[name][kind]].append((template, 100 + person, f"img/{len(faces)}.jpg"))
    faces = [faces[i] for i in rng.permutation(len(faces))]
    for number, (_, _, person, _) in enumerate(faces, 1):
        (home / "loose_crop" / f"{number}.jpg").write_bytes(crops(person, number) if crops else b"")
    points = (np.array(TEMPLATE) + rng.normal(0, 1, (len(faces), 5, 2)) + 20).round(3).reshape(-1, 10).tolist()
    lines = {
        "name_5pts_score.txt": [(f"{i}.jpg", *p, f[3]) for i, (f, p) in enumerate(zip(faces, points, strict=True), 1)],
        "face_tid_mid.txt": [(f"{i}.jpg", *face[:2]) for i, face in enumerate(faces, 1)],
    }
    of = {template: person for (person, _), template in zip(templates, ids, strict=True)}
    left, right = ([t for (_, k), t in zip(templates, ids, strict=True) if (k == 2) is p] for p in (False, True))
    pairs = [pair for pair in itertools.product(left, right) if rng.random() < 0.8 or of[pair[0]] == of[pair[1]]]
    lines["template_pair_label.txt"] = [(a, b, int(of[a] == of[b])) for a, b in pairs]
    for kind, table in lines.items():
        text = "".join(" ".join(map(str, line)) + "\n" for line in table)
        (home / "meta" / f"{name}_{kind}").write_text(text)
    for kind, table in rows.items():
        text = "".join(",".join(map(str, (*line, 0))) + "\n" for line in table)
        (home / "meta" / f"{name}_1N_{kind}.csv").write_text("TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID\n" + text)
    return home


def at_least(score, threshold):
    return score > threshold - 1e-12


def best_rate(wanted, others, share):
    """The largest share of `wanted` scores that a threshold accepts which accepts at most a `share` of the `others`."""
    most = share * len(others) * (1 + 1e-12)
    allowed = [t for t in [*wanted, *others] if sum(at_least(x, t) for x in others) <= most]
    return max((sum(at_least(x, t) for x in wanted) / len(wanted) for t in allowed), default=0.0)


def reference(home, embeddings, mode):
    """{"tar": {FAR: share}, "rank": {gallery: {k: share}}, "tpir": {gallery: {FPIR: share}}, "auc"}."""
    meta, name = home / "meta", home.name.lower()
    faces = [line.split() for line in (meta / f"{name}_face_tid_mid.txt").read_text().splitlines()]
    scores = [float(line.split()[-1]) for line in (meta / f"{name}_name_5pts_score.txt").read_text().splitlines()]
    media = defaultdict(lambda: defaultdict(list))
    for (_, template, number), vector, score in zip(faces, embeddings, scores, strict=True):
        vector = vector.astype(float)
        if "N0" in mode:
            vector = vector / np.sqrt((vector**2).sum())
        media[int(template)][int(number)].append(vector * score if "D1" in mode else vector)
    unit = {}
    for template, groups in media.items():
        total = sum(sum(vectors) / len(vectors) for vectors in groups.values())
        norm = np.sqrt((total**2).sum())
        unit[template] = total / norm if norm else total

    def cosine(a, b):
        return float(unit[a] @ unit[b])

    pairs = [[*map(int, line.split())] for line in (meta / f"{name}_template_pair_label.txt").read_text().splitlines()]
    same, different = ([cosine(a, b) for a, b, label in pairs if label == kind] for kind in (1, 0))
    wins = [1.0 if x > y + 1e-12 else 0.5 * at_least(x, y) for x in same for y in different]
    found = {"tar": {far: best_rate(same, different, far) for far in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}}
    found |= {"auc": sum(wins) / len(wins), "rank": {}, "tpir": {}}
    lists = {}
    for kind in LISTS[name]:
        with open(meta / f"{name}_1N_{kind}.csv") as file:
            lists[kind] = {int(row["TEMPLATE_ID"]): int(row["SUBJECT_ID"]) for row in csv.DictReader(file)}
    for kind in LISTS[name][:2]:
        owner = {subject: template for template, subject in lists[kind].items()}
        ranks, own, best = [], [], []
        for probe, subject in lists["probe_mixed"].items():
            all_scores = [cosine(probe, template) for template in lists[kind]]
            if subject not in owner:
                best.append(max(all_scores))
                continue
            score = cosine(probe, owner[subject])
            ranks.append(sum(at_least(x, score) for x in all_scores))
            own.append(score if ranks[-1] == 1 else -9.0)
        found["rank"][kind] = {k: sum(rank <= k for rank in ranks) / len(ranks) for k in (1, 5, 10)}
        first = [score for score in own if score > -9]
        share = len(first) / len(own)
        found["tpir"][kind] = {far: share * best_rate(first, best, far) if first else 0.0 for far in (1e-2, 1e-1)}
    return found
