"""Downloads a backbone's original file, checks its sha256 and converts it.

The file goes to `sources/` in $VITFACE_HOME (default ~/.cache/vitface). It is named FILE.part until it is complete and
its sha256 is the pinned one; a broken download continues from there. The converted NAME.safetensors goes to
$VITFACE_HOME, where `vitface.store.backbone.find_backbone` looks, and the original is deleted.
"""

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vitface.data.progress import Progress
from vitface.errors import WeightsError, command, in_one_line
from vitface.files import cache_home, make_folder, sha256_file
from vitface.lock import waiting_lock
from vitface.presets import backbone_name
from vitface.store.backbone import read_backbone
from vitface.store.sources import DETECTOR, RUNTIME, SOURCES, Source, how_to_get
from vitface.version import __version__
from vitface.weights.conversion import Conversion, convert_backbone

TIMEOUT = 30  # seconds without a byte
MINUTE, LEAST_BYTES = 60.0, 1 << 16  # less than that in a minute is no download
MAX_BYTES = 8 << 30


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, no other process fetches into the same folder: it would write into the same part."""
    make_folder(cache_home().absolute())
    with waiting_lock(cache_home() / ".fetch.lock"):
        yield


@_alone()
def fetch_backbone(name: str) -> Conversion | None:
    """Downloads and converts a backbone by its preset's name or alias; None if it is there already.

    WeightsError if no original is pinned for `name`, or if the download fails; it tells what to do by hand.
    """
    name = backbone_name(name)
    source = SOURCES.get(name)
    if source is None or source.url is None:
        raise WeightsError(how_to_get(name))
    file, out = cache_home() / "sources" / source.url.rsplit("/", 1)[1], cache_home() / f"{name}.safetensors"
    with suppress(WeightsError):
        read_backbone(out)
        return None
    if not file.is_file():
        download(source, file, f"3. {command('convert', name, '--src', file, '--out', out)}")
    elif sha256_file(file) != source.sha256:
        raise WeightsError(f"{file} does not have the published sha256, {source.sha256}; delete it and fetch again")
    done = convert_backbone(name, file, out)
    file.unlink()
    return done


def fetch_detector() -> Path:
    """Downloads YuNet, which `vitface align` uses, unless it is there; WeightsError if that fails."""
    return _fetch(DETECTOR, "face_detection_yunet.onnx")


def fetch_runtime() -> Path:
    """The same of npm's package of ONNX Runtime Web, which runs a model in a browser."""
    assert RUNTIME.url
    return _fetch(RUNTIME, RUNTIME.url.rsplit("/", 1)[1])


@_alone()
def _fetch(source: Source, name: str) -> Path:
    file = cache_home() / name
    if not file.is_file() or sha256_file(file) != source.sha256:
        download(source, file)
    return file


def download(source: Source, file: Path, next_step: str = "") -> None:
    """Downloads `source` and continues from FILE.part if there is one; `file` appears only when it is right.

    WeightsError if the transfer breaks, which keeps the part; it tells what to do by hand, `next_step` last.
    WeightsError if the sha256 is not the pinned one, which deletes the part.
    """
    assert source.url is not None
    part = file.with_name(file.name + ".part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _transfer(source.url, part)
        found = sha256_file(part)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise WeightsError(
            f"cannot download {source.url}: {in_one_line(str(error))}\n"
            "Run the same command again to continue from where it stopped, or do it by hand:\n"
            f"  1. download {source.url}\n     (sha256 {source.sha256})\n  2. put it at {file}\n  {next_step}".rstrip()
        ) from None
    if found != source.sha256:
        part.unlink()
        raise WeightsError(
            f"{source.url} arrived with sha256 {found}, not the pinned {source.sha256}: the download was deleted. "
            "Fetch again; if this repeats, the file was replaced at its source or on the way: do not use it"
        )
    os.replace(part, file)


class _Slow:
    """Ends a transfer that keeps the connection with a byte now and then."""

    def __init__(self) -> None:
        self.since, self.bytes = time.monotonic(), 0

    def received(self, count: int) -> None:
        """OSError if less than LEAST_BYTES came in MINUTE."""
        self.bytes += count
        now = time.monotonic()
        if now - self.since > MINUTE:
            if self.bytes < LEAST_BYTES:
                raise OSError(f"the server sent {self.bytes} bytes in {MINUTE:.0f} s")
            self.since, self.bytes = now, 0


def _transfer(url: str, part: Path) -> None:
    """Appends what is missing to `part`, or writes all of it if the server sends the whole file."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": f"vitface/{__version__}", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        # 416: nothing follows the part. It is complete or of another file; its sha256 decides
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and have:
            return
        raise
    with response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError(f"the server sent another range than the one after byte {have}; the next run starts anew")
        start, length = have if resumed else 0, response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if total is not None and not start <= total <= MAX_BYTES:
            raise OSError(f"the server announces {length} bytes")
        slow = _Slow()
        with (
            open(part, "ab" if resumed else "wb") as out,
            Progress(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while chunk := response.read1(1 << 16):
                if out.tell() + len(chunk) > (total or MAX_BYTES):
                    out.truncate(0)  # the next call must not go on from there
                    raise OSError(f"the server sends more than {total or MAX_BYTES:,} bytes")
                out.write(chunk)
                bar.update(len(chunk))
                slow.received(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"the connection broke after {part.stat().st_size} of {total} bytes")
