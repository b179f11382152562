"""Search against float64 and scikit-learn, in bounded memory; galleries on disk, whole or named as damaged."""

import itertools
import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import Largest, optional
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import vitface
from vitface.errors import CheckpointError, DataError
from vitface.gallery import blocks
from vitface.gallery import gallery as module
from vitface.gallery.gallery import Gallery, Match
from vitface.gallery.parts import Settings, part_files, read_names


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that few rows are many blocks."""
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "QUERIES", 4)
    monkeypatch.setattr(module, "MAPPED", 5)


def rows(count, dim=12, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def filled(count, dim=12):
    gallery = Gallery(dim)
    gallery.add([f"n{i}" for i in range(count)], rows(count, dim))
    return gallery


def unit(x):
    return x.astype("f8") / np.linalg.norm(x.astype("f8"), axis=1, keepdims=True)


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 80), st.lists(st.integers(1, 33), max_size=4))
def test_search_is_exact_however_rows_were_added(count, num_queries, k, cuts):
    embeddings, queries = rows(count), rows(num_queries, seed=1)
    gallery = Gallery(12)
    edges = [0, *(min(cut, count) for cut in np.cumsum(cuts)), count]
    for start, stop in itertools.pairwise(edges):
        gallery.add([f"n{i}" for i in range(start, stop)], embeddings[start:stop])
    scores, found = gallery.top_k(queries, k)
    exact = unit(queries) @ unit(embeddings).T
    order = np.argsort(-exact, axis=1)[:, :k]
    np.testing.assert_array_equal(found, order)
    np.testing.assert_allclose(scores, np.take_along_axis(exact, order, 1), atol=1e-6)
    assert gallery.search(queries, k)[-1][0] == Match(f"n{order[-1, 0]}", pytest.approx(exact[-1].max(), abs=1e-6))


def test_search_agrees_with_scikit_learn():
    neighbors = optional("sklearn.neighbors")
    embeddings, queries = rows(200, 32), rows(20, 32, seed=1)
    distances, nearest = neighbors.NearestNeighbors(n_neighbors=7, metric="cosine").fit(embeddings).kneighbors(queries)
    gallery = Gallery(32)
    gallery.add([str(i) for i in range(200)], embeddings)
    scores, found = gallery.top_k(queries, 7)
    np.testing.assert_array_equal(found, nearest)
    np.testing.assert_allclose(scores, 1 - distances, atol=1e-6)


def test_memory_does_not_grow_with_rows_and_queries():
    gallery, queries = filled(500), torch.from_numpy(rows(40, seed=1))
    with Largest() as largest:
        gallery.top_k(queries, 3)
    assert 0 < largest.numel <= 40 * 12  # the queries themselves; a block's scores are 4 x 16, all scores 40 x 500


def test_edges():
    gallery = filled(0)
    assert len(gallery) == 0 and gallery.embeddings.shape == (0, 12)
    assert gallery.search(rows(2)) == [[], []]
    gallery.add(["a", "a"], 5 * rows(2))
    np.testing.assert_allclose(gallery.embeddings, unit(rows(2)), atol=1e-6)
    assert gallery.names == ["a", "a"] and [m.name for m in gallery.search(rows(1), 5)[0]] == ["a", "a"]
    before = gallery.embeddings
    for names, embeddings, message in (
        (["b"], rows(2), "2 embeddings need a list of as many names"),
        ("ab", rows(2), "need a list"),
        (["b"], rows(1, 5), r"must be \(n, 12\), not \(1, 5\)"),
        (["b"], 0 * rows(1), "finite and not zero: row 0 has norm 0"),
        (["b", "c"], rows(2) * [[1], [np.nan]], "row 1 has norm nan; if a model made it, its weights"),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.add(names, embeddings)
    assert len(gallery) == 2 and np.array_equal(gallery.embeddings, before)
    with pytest.raises(ValueError, match="k is a whole number, at least 1, not 0"):
        gallery.search(rows(1), 0)
    with pytest.raises(ValueError, match="embedding_dim is a whole number, at least 1"):
        Gallery(0)


def test_round_trip(tmp_path):
    gallery = filled(40)
    gallery.settings = Settings("abc", True, {1e-3: 0.25})
    gallery.names[3] = "Zoë/1.jpg\n"
    gallery.save(tmp_path / "deep" / "people")
    loaded = vitface.Gallery.load(tmp_path / "deep" / "people")
    assert loaded.names == gallery.names == read_names(tmp_path / "deep" / "people")
    assert loaded.settings == gallery.settings and loaded.thresholds == {1e-3: 0.25}
    np.testing.assert_allclose(loaded.embeddings, gallery.embeddings, atol=1e-7)
    assert len(part_files(tmp_path / "deep" / "people")) == 3
    with pytest.raises(DataError, match="is not empty"):
        filled(1).save(tmp_path / "deep" / "people")
    with pytest.raises(DataError, match="is not a gallery; make one with vitface embed"):
        Gallery.load(tmp_path)


def test_a_tilde_is_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    filled(3).save("~/people")
    assert (tmp_path / "home" / "people").is_dir() and not (tmp_path / "~").exists()
    assert len(Gallery.load("~/people")) == 3
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'home' / 'people'} is .*neither a run"):
        vitface.load("~/people")


def test_a_gallery_is_saved_again_wherever_it_was_saved(tmp_path):
    """A person who is removed after a backup goes from the gallery's first folder too, and from the backup."""
    first, backup = tmp_path / "first", tmp_path / "backup"
    gallery = filled(20)
    gallery.save(first)
    gallery.add(["zoe"], rows(1, seed=1))
    gallery.save(first)
    assert Gallery.load(first).names == gallery.names and len(gallery) == 21
    loaded = Gallery.load(first)
    loaded.save(backup)
    assert loaded.remove("n3") == 1
    loaded.add(["ben"], rows(1, seed=2))
    for path in (first, backup, first):
        loaded.save(path)
        assert Gallery.load(path).names == loaded.names == [*(n for n in gallery.names if n != "n3"), "ben"]
        np.testing.assert_array_equal(Gallery.load(path).embeddings, loaded.embeddings)
        assert not any(b'n3\\"' in file.read_bytes() for file in part_files(path))
    shutil.rmtree(first)
    loaded.save(first)
    assert Gallery.load(first).names == loaded.names
    with pytest.raises(DataError, match="has other rows than when it was loaded or saved"):
        gallery.save(first)


def plant(path, fault):
    part = path / "part-000001.safetensors"
    tensors, metadata = (
        {"embeddings": torch.full((2, 12), 12**-0.5)},
        {"format": "vitface-gallery-1", "names": '["a", "b"]'},
    )
    if fault == "settings":
        (path / "gallery.json").write_text(json.dumps({"format": "vitface-gallery-2", "model": None}))
    elif fault == "deep settings":
        (path / "gallery.json").write_text("[" * 100_000)
    elif fault == "cut":
        part.write_bytes(part.read_bytes()[:-20])
    elif fault == "names":
        save_file(tensors, part, {**metadata, "names": '["a"]'})
    elif fault == "name types":
        save_file(tensors, part, {**metadata, "names": "[1, 2]"})
    elif fault == "dtype":
        save_file({"embeddings": torch.ones(2, 12, dtype=torch.int32)}, part, metadata)
    elif fault == "width":
        save_file({"embeddings": torch.full((2, 11), 11**-0.5)}, part, metadata)
    elif fault == "nan":
        save_file({"embeddings": torch.full((2, 12), torch.nan)}, part, metadata)
    elif fault == "zero":
        save_file({"embeddings": torch.zeros(2, 12)}, part, metadata)
    elif fault == "stranger":
        save_file(tensors, part)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("settings", "gallery.json is damaged, or of another version"),
        ("deep settings", "gallery.json is damaged"),
        ("cut", "part-000001.safetensors is damaged"),
        ("names", "1 names for embeddings of shape"),
        ("name types", "not a list of strings"),
        ("dtype", "names for embeddings"),
        ("width", "mixes embeddings of 12 and of 11"),
        ("nan", "not of unit norm"),
        ("zero", "not of unit norm"),
        ("stranger", "not a part of a gallery"),
    ],
)
def test_damage_is_named(tmp_path, fault, message):
    filled(20).save(tmp_path / "people")
    plant(tmp_path / "people", fault)
    with pytest.raises(DataError, match=message):
        Gallery.load(tmp_path / "people")


def test_mutated_parts_are_named_or_valid(tmp_path):
    filled(20).save(tmp_path / "people")
    part = tmp_path / "people" / "part-000001.safetensors"
    whole, rng = part.read_bytes(), random.Random(0)
    outcomes = set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        part.write_bytes(data)
        try:
            assert Gallery.load(tmp_path / "people").embeddings.shape == (20, 12)
            outcomes.add("valid")
        except DataError:
            outcomes.add("named")
    assert outcomes == {"valid", "named"}


def test_rows_that_a_gpu_has_no_room_for_stay_in_memory(tmp_path, monkeypatch):
    """With a device that computes nothing in place of the GPU: each block is taken there when it is searched."""
    free = {"bytes": blocks.SPARE + 16 * 12 * 4}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["bytes"], 80 << 30))
    gpu = torch.device("cuda")
    assert blocks.home(gpu, 16 * 12 * 4) == gpu and blocks.home(gpu, 16 * 12 * 4 + 1) == torch.device("cpu")
    free["bytes"] = blocks.SPARE
    filled(40).save(tmp_path / "people")
    gallery = Gallery(12, Settings())
    monkeypatch.setattr(gallery, "device", gpu)
    monkeypatch.setattr(Gallery, "_unit_rows", lambda self, rows: rows)
    gallery.add_parts(tmp_path / "people")
    assert [block.file is not None for block in gallery._blocks] == [True, True, True]
    gallery.add([*"abcdefgh"], torch.eye(12)[:8])
    assert {block.rows.device.type for block in gallery._blocks} == {"cpu"} and len(gallery) == 48
    monkeypatch.setattr(gallery, "device", torch.device("meta"))
    with Largest() as largest:
        scores, found = gallery._best(torch.eye(12, device="meta")[:4], 3)
    assert scores.device.type == found.device.type == "meta" and scores.shape == found.shape == (4, 3)
    assert largest.numel <= 16 * 12


@pytest.mark.gpu
def test_search_on_a_gpu_finds_what_the_cpu_finds():
    on_cpu, on_gpu = filled(100), Gallery(12, device="cuda")
    on_gpu.add(on_cpu.names, rows(100))
    for ours, theirs in zip(on_gpu.top_k(rows(9, seed=1), 5), on_cpu.top_k(rows(9, seed=1), 5), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(on_gpu.embeddings, on_cpu.embeddings, atol=1e-6)


@pytest.mark.parametrize("num_queries", [1, 5])
@given(st.integers(1, 70), st.integers(1, 80), st.integers(0, 9))
def test_float16_rounds_the_rows_and_nothing_else(num_queries, count, k, seed):
    embeddings, queries = rows(count, seed=seed), rows(num_queries, seed=seed + 10)
    gallery = Gallery(12, dtype="float16")
    gallery.add([f"n{i}" for i in range(count)], embeddings)
    scores, found = gallery.top_k(queries, k)
    exact = unit(queries) @ unit(embeddings).T
    np.testing.assert_allclose(scores, np.take_along_axis(exact, found, 1), atol=5e-4)
    stored = unit(queries) @ gallery.embeddings.astype("f8").T
    np.testing.assert_allclose(scores, -np.sort(-stored, axis=1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(scores, np.take_along_axis(stored, found, 1), atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all() and all(len(set(row)) == len(row) for row in found.tolist())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [0.1, 0.6])
def test_float16_finds_the_best_of_rows_that_it_rounds_to_one_number(size, seed):
    """Cosines 2e-5 apart, of which float16 has one value for up to 24; in several blocks, in any order."""
    query, across = np.eye(512)[0], rows(40, 512, seed)
    across[:, 0] = 0
    cosines = size + 2e-5 * np.random.default_rng(seed).permutation(40)[:, None]
    gallery = Gallery(512, dtype="float16")
    gallery.add([str(i) for i in range(40)], cosines * query + np.sqrt(1 - cosines**2) * unit(across))
    query = query + 1e-5 * rows(1, 512, seed=seed + 9)
    exact = (unit(query) @ gallery.embeddings.astype("f8").T)[0]
    for k in (1, 5, 40):
        scores, found = gallery.top_k(query, k)
        np.testing.assert_allclose(scores[0], np.sort(exact)[::-1][:k], atol=1e-6)
        np.testing.assert_allclose(exact[found[0]], scores[0], atol=1e-6)


def test_float16_takes_half_the_disk_and_is_kept(tmp_path):
    gallery = filled(40, 512)
    gallery.save(tmp_path / "whole")
    half = Gallery.load(tmp_path / "whole", dtype="float16")
    half.save(tmp_path / "half")
    size = {name: sum(p.stat().st_size for p in part_files(tmp_path / name)) for name in ("whole", "half")}
    assert 0.5 < size["half"] / size["whole"] < 0.55
    loaded = Gallery.load(tmp_path / "half")
    assert loaded.settings.dtype == "float16" and loaded.embeddings.dtype == np.float32
    np.testing.assert_allclose(loaded.embeddings, gallery.embeddings, atol=3e-4)
    Gallery.load(tmp_path / "whole", dtype="float16").save(tmp_path / "whole")  # in place
    assert sum(p.stat().st_size for p in part_files(tmp_path / "whole")) < 0.55 * size["whole"]
    np.testing.assert_allclose(Gallery.load(tmp_path / "whole").embeddings, loaded.embeddings, atol=1e-4)
