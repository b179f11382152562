"""A gallery for engines that serve more than one machine: Parquet, FAISS, PostgreSQL with pgvector.

Each export has the names, and the gallery's settings as JSON: the model's SHA-256, whether photos were aligned, and the
thresholds {FAR: cosine}. Rows are of unit norm, so that the inner product is the cosine.
"""

import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vitface.errors import ExchangeError
from vitface.extras import require
from vitface.files import sync_folder
from vitface.gallery.gallery import Gallery

MAX_NUMBERS = 16_000  # of a row, in pgvector
INDEXED = {"vector": 2000, "halfvec": 4000}  # numbers of a row that an index of pgvector takes
COPY_HEAD, COPY_END = b"PGCOPY\n\xff\r\n\0" + bytes(8), b"\xff\xff"


def described(gallery: Gallery) -> str:
    """The settings that an export keeps, as JSON."""
    settings = gallery.settings
    thresholds = {f"{far:g}": cosine for far, cosine in settings.thresholds.items()}
    return json.dumps({"model": settings.model, "align": settings.align, "thresholds": thresholds})


def write_parquet(gallery: Gallery, out: Path) -> None:
    """One file, the columns name and embedding, a list of E float32 or float16; metadata "vitface" are the settings."""
    require("--format parquet", "pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind = pa.list_(pa.from_numpy_dtype(gallery.settings.dtype), gallery.embedding_dim)
    schema = pa.schema([("name", pa.string()), ("embedding", kind)], {"vitface": described(gallery)})
    with pq.ParquetWriter(out, schema, use_dictionary=False) as file:
        for names, rows in gallery.pieces():
            flat = pa.array(rows.astype(gallery.settings.dtype).ravel())
            columns = [pa.array(names, pa.string()), pa.FixedSizeListArray.from_arrays(flat, gallery.embedding_dim)]
            file.write_table(pa.table(columns, schema=schema))


def write_faiss(gallery: Gallery, out: Path) -> None:
    """index.faiss, exact, by inner product; names.json, a list in the order of its ids; settings.json."""
    require("--format faiss", "faiss")
    import faiss

    dim, metric = gallery.embedding_dim, faiss.METRIC_INNER_PRODUCT
    if gallery.settings.dtype == "float16":
        index = faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, metric)
        index.is_trained = True
    else:
        index = faiss.IndexFlatIP(dim)
    for _, rows in gallery.pieces():
        index.add(np.ascontiguousarray(rows))
    faiss.write_index(index, str(out / "index.faiss"))
    (out / "names.json").write_text(json.dumps(gallery.names))
    (out / "settings.json").write_text(described(gallery))


LOAD = """\
-- psql -d DATABASE -f load.sql, in this folder: makes the tables {table} and {table}_settings
\\set ON_ERROR_STOP on
BEGIN;
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE {table} (id bigint PRIMARY KEY, name text NOT NULL, embedding {kind}({dim}) NOT NULL);
\\copy {table} FROM 'rows.pgcopy' WITH (FORMAT binary)
CREATE TABLE {table}_settings (settings jsonb NOT NULL);
INSERT INTO {table}_settings VALUES ({settings});
COMMIT;
-- the five most alike, exactly: <#> is minus the inner product, which is the cosine
--   SELECT name, -(embedding <#> '[...]') AS cosine FROM {table} ORDER BY embedding <#> '[...]' LIMIT 5;
{index}"""
INDEX = """-- nearly always the same in less time, once there are many rows:
--   CREATE INDEX ON {table} USING hnsw (embedding {kind}_ip_ops);
"""


def write_pgvector(gallery: Gallery, out: Path, table: str = "faces") -> None:
    """load.sql for psql, and the rows it loads: id, name, embedding vector(E); for float16 halfvec(E)."""
    kind = "halfvec" if gallery.settings.dtype == "float16" else "vector"
    dim = gallery.embedding_dim
    if dim > MAX_NUMBERS:
        raise ExchangeError(f"pgvector takes at most {MAX_NUMBERS:,} numbers a row, and this gallery has {dim:,}")
    for name in gallery.names:
        if "\0" in name:
            raise ExchangeError(f"PostgreSQL takes no NUL in a text: {name!r:.60}")
    settings = "'" + described(gallery).replace("'", "''") + "'"
    index = INDEX.format(table=table, kind=kind) if dim <= INDEXED[kind] else ""
    (out / "load.sql").write_text(LOAD.format(table=table, kind=kind, dim=dim, settings=settings, index=index))
    with open(out / "rows.pgcopy", "xb") as file:
        _write_copy(gallery, file, ">f2" if kind == "halfvec" else ">f4")


def _write_copy(gallery: Gallery, file: BinaryIO, number: str) -> None:
    """PostgreSQL's binary COPY, in which pgvector has uint16 E, uint16 0, then the numbers."""
    file.write(COPY_HEAD)
    ids = itertools.count()
    for names, rows in gallery.pieces():
        for name, row in zip(names, rows.astype(number), strict=True):
            file.write((3).to_bytes(2, "big"))
            vector = len(row).to_bytes(2, "big") + bytes(2) + row.tobytes()
            for field in (next(ids).to_bytes(8, "big"), name.encode(), vector):
                file.write(len(field).to_bytes(4, "big") + field)
    file.write(COPY_END)


FORMATS = {"parquet": write_parquet, "faiss": write_faiss, "pgvector": write_pgvector}


def export(gallery: Gallery, to: str, out: Path) -> None:
    """Writes a new folder, or for "parquet" a new file, for its owner alone; nothing is left after a failure."""
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".export-") as folder:
        fresh = Path(folder) / out.name
        if to != "parquet":
            fresh.mkdir(mode=0o700)
        FORMATS[to](gallery, fresh)
        for file in [fresh] if to == "parquet" else fresh.iterdir():
            file.chmod(0o600)
        os.rename(fresh, out)
    sync_folder(out.absolute().parent)
