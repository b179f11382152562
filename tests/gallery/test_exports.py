"""A gallery in FAISS, Parquet and PostgreSQL: the same neighbours and scores as ours."""

import json
import os
import shutil
import stat
import subprocess

import numpy as np
import pytest
import torch
from conftest import optional

from vitface.__main__ import main
from vitface.gallery import parts
from vitface.gallery.gallery import Gallery
from vitface.gallery.parts import Settings

COUNT, DIM, QUERIES, MANY = 10_000, 64, 20, 10_000


def each_dtype(count, *marks):
    return [pytest.param((dtype, count), id=f"{dtype}, {count} queries", marks=marks) for dtype in parts.DTYPES]


@pytest.fixture(scope="module", params=[*each_dtype(QUERIES), *each_dtype(MANY, pytest.mark.slow)])
def people(request, tmp_path_factory):
    """(gallery, its folder, queries); names of all kinds."""
    dtype, queries = request.param
    generator = torch.Generator().manual_seed(0)
    gallery = Gallery(DIM, Settings("m" * 64, True, {1e-3: 0.25}), dtype=dtype)
    names = [f"person-{i // 4}/{i}.jpg" for i in range(COUNT)]
    names[:3] = ["Zoë/王\t1.jpg", 'O\'Brien \\ "x".jpg', "two\nlines"]
    gallery.add(names, torch.randn(COUNT, DIM, generator=generator))
    gallery.save(folder := tmp_path_factory.mktemp("galleries") / "people")
    return gallery, folder, torch.nn.functional.normalize(torch.randn(queries, DIM, generator=generator), dim=1)


def exported(people, to, out):
    assert main(["export", str(people[1]), "--format", to, "--out", str(out)]) == 0
    mode = stat.S_IMODE(out.stat().st_mode)
    assert mode == (0o600 if out.is_file() else 0o700) and [path.name for path in out.parent.iterdir()] == [out.name]
    assert out.is_file() or {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o600}
    return out


def check_same(people, found, tolerance=1e-5):
    """`found`: for each query the ten (name, score); ties aside, and what is nearer than rounding."""
    for ours, theirs in zip(people[0].search(people[2], 12), found, strict=True):
        np.testing.assert_allclose([score for _, score in theirs], [m.score for m in ours[:10]], atol=tolerance)
        exact = dict(ours)
        for (name, score), match in zip(theirs, ours[:10], strict=True):
            assert name == match.name or abs(exact[name] - score) < tolerance > abs(match.score - score)


def test_faiss(people, tmp_path):
    faiss = optional("faiss")
    out = exported(people, "faiss", tmp_path / "index")
    index, names = faiss.read_index(str(out / "index.faiss")), json.loads((out / "names.json").read_text())
    scores, ids = index.search(people[2].numpy(), 10)
    check_same(people, [[(names[i], s) for i, s in zip(*pair, strict=True)] for pair in zip(ids, scores, strict=True)])
    assert json.loads((out / "settings.json").read_text()) == {
        "model": "m" * 64,
        "align": True,
        "thresholds": {"0.001": 0.25},
    }
    whole = COUNT * DIM * (2 if people[0].settings.dtype == "float16" else 4)
    assert whole < (out / "index.faiss").stat().st_size < whole + 1000


def test_parquet(people, tmp_path):
    pq = optional("pyarrow.parquet")
    table = pq.read_table(exported(people, "parquet", tmp_path / "people.parquet"))
    assert table["name"].to_pylist() == people[0].names
    rows = np.stack(table["embedding"].to_numpy())
    assert rows.dtype == people[0].settings.dtype
    np.testing.assert_array_equal(rows.astype("f4"), people[0].embeddings)
    assert json.loads(table.schema.metadata[b"vitface"])["thresholds"] == {"0.001": 0.25}


def readable(path):
    """For the server's user, who is another one where the tests run as root."""
    for folder in (path, *path.iterdir(), *[parent for parent in path.parents if parent.name.startswith("pytest-")]):
        folder.chmod(folder.stat().st_mode | 0o055)


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    """A function that runs psql on a server with pgvector: one of its own, on a socket; skips where there is none.

    $VITFACE_TEST_POSTGRES names the folder of its programs; by default they are looked for in PATH.
    """
    programs = os.environ.get("VITFACE_TEST_POSTGRES") or os.path.dirname(shutil.which("initdb") or "")
    if not programs or not os.path.exists(os.path.join(programs, "pg_config")):
        pytest.skip("no PostgreSQL here")
    shared = subprocess.run([os.path.join(programs, "pg_config"), "--sharedir"], capture_output=True, text=True).stdout
    if not os.path.exists(os.path.join(shared.strip(), "extension", "vector.control")):
        pytest.skip("no pgvector here")
    folder = tmp_path_factory.mktemp("pg")
    folder.chmod(0o777)
    readable(folder.parent)
    user = {"user": "nobody"} if os.geteuid() == 0 else {}

    def run(name, *arguments, check=True, **options):
        command = [os.path.join(programs, name), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, **user, **options)
        assert not check or done.returncode == 0, done.stderr
        return done

    data = str(folder / "data")
    run("initdb", "-D", data, "-A", "trust", "-U", "test", "--no-sync", cwd=folder)
    settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    run("pg_ctl", "-D", data, "-o", settings, "-l", str(folder / "log"), "-w", "start", cwd=folder, env=os.environ)
    psql = ["-h", str(folder), "-U", "test", "-d", "postgres", "-X", "-q", "-A", "-t"]
    try:
        yield lambda *arguments, **options: run("psql", *psql, *arguments, **options)
    finally:
        run("pg_ctl", "-D", data, "-m", "immediate", "stop")


def test_pgvector(people, postgres, tmp_path):
    out = exported(people, "pgvector", tmp_path / "tables")
    readable(out)
    readable(out.parent)
    postgres("-c", "DROP TABLE IF EXISTS faces, faces_settings")
    loaded = postgres("-f", "load.sql", cwd=out, check=False)
    if 'type "halfvec" does not exist' in loaded.stderr:
        pytest.skip("pgvector before 0.7 has no halfvec")
    assert loaded.returncode == 0, loaded.stderr
    kind = "halfvec" if people[0].settings.dtype == "float16" else "vector"
    rows = "".join(f"{i}\t{query}\n" for i, query in enumerate(people[2].tolist()))
    nearest = "SELECT name, -(embedding <#> q) AS cosine FROM faces ORDER BY embedding <#> q LIMIT 10"
    answer = postgres(
        input=f"CREATE TEMP TABLE queries (id int, q {kind}({DIM}));\nCOPY queries FROM STDIN;\n{rows}\\.\n"
        f"SELECT json_agg(json_build_array(name, cosine) ORDER BY id, cosine DESC) "
        f"FROM queries, LATERAL ({nearest}) AS found;"
    )
    each = [tuple(pair) for pair in json.loads(answer.stdout)]
    found = [each[at : at + 10] for at in range(0, len(each), 10)]
    half = people[0].settings.dtype == "float16"  # pgvector rounds the query, too
    check_same(people, found, 2e-4 if half else 1e-5)
    kept = json.loads(postgres("-c", "SELECT json_agg(name ORDER BY id) FROM faces").stdout)
    assert kept == people[0].names
    settings = json.loads(postgres("-c", "SELECT settings FROM faces_settings").stdout)
    assert settings["thresholds"] == {"0.001": 0.25} and settings["model"] == "m" * 64
    again = postgres("-f", "load.sql", cwd=out, check=False)
    assert again.returncode and 'relation "faces" already exists' in again.stderr


@pytest.mark.parametrize(
    ("to", "module", "package"), [("faiss", "faiss", "faiss-cpu"), ("parquet", "pyarrow", "pyarrow")]
)
def test_an_engine_that_is_not_installed(people, tmp_path, monkeypatch, capsys, to, module, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["export", str(people[1]), "--format", to, "--out", str(tmp_path / "out")]) == 2
    assert f"--format {to} needs {package}:\n  pip install {package}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_postgres_cannot_hold(tmp_path, capsys):
    for number, gallery in enumerate((Gallery(4), Gallery(16_001))):
        gallery.add(["a\0b"], np.ones((1, gallery.embedding_dim)))
        gallery.save(tmp_path / str(number))
        assert main(["export", str(tmp_path / str(number)), "--format", "pgvector", "--out", str(tmp_path / "x")]) == 2
    printed = capsys.readouterr().err
    assert "PostgreSQL takes no NUL in a text" in printed and "at most 16,000 numbers a row" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
