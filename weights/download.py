"""Downloads a backbone's original file, checks its sha256 and converts it.

The file goes to `sources/` in $VITFACE_HOME (default ~/.cache/vitface), as FILE.part until it is complete and its
sha256 is the pinned one; a broken download goes on from there. The converted NAME.safetensors lies in $VITFACE_HOME,
where `vitface.store.backbones.find_backbone` looks, and the original is deleted.
"""

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

import vitface
from vitface.config import VIT_PRESETS, ViTConfig, backbone_name
from vitface.errors import WeightsError
from vitface.files import sha256_file
from vitface.home import cache_home
from vitface.store.backbones import read_backbone
from vitface.weights.conversion import Conversion, convert_file
from vitface.weights.sources import DETECTOR, SOURCES

TIMEOUT = 30  # seconds without a byte


def fetch_backbone(name: str) -> Conversion | None:
    """Downloads and converts a backbone by its preset's name or alias; None if it is there already.

    WeightsError if no original is pinned for `name`, or with what to do by hand if the download does not work.
    """
    name = backbone_name(name)
    if name not in SOURCES:
        raise WeightsError(f"{name} ships with the package: there is nothing to fetch")
    if SOURCES[name].url is None:
        raise WeightsError(
            f"no original of {name} is pinned; convert a file of {SOURCES[name].origin} that you have:\n"
            f"  vitface convert {name} --src FILE --out {cache_home() / f'{name}.safetensors'}"
        )
    return fetch_file(name, VIT_PRESETS[name])


def fetch_file(name: str, config: ViTConfig) -> Conversion | None:
    """`fetch_backbone` for any sizes: `config` says what the model in the file of `SOURCES[name]` is."""
    out = cache_home() / f"{name}.safetensors"
    if _is_converted(out):
        return None
    url, sha256 = SOURCES[name].url, SOURCES[name].sha256
    assert url is not None and sha256 is not None
    file = cache_home() / "sources" / url.rsplit("/", 1)[1]
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            download(url, sha256, file)
        except (OSError, http.client.HTTPException) as error:
            raise WeightsError(f"cannot download {url}: {error}\n{by_hand(name, file, out)}") from None
    elif sha256_file(file) != sha256:
        raise WeightsError(f"{file} is not the published file, whose sha256 is {sha256}; delete it and fetch again")
    done = convert_file(name, config, file, out)
    file.unlink()
    return done


def _is_converted(path: Path) -> bool:
    try:
        read_backbone(path)
    except WeightsError:
        return False
    return True


def by_hand(name: str, file: Path, out: Path) -> str:
    """What to do on a machine without a network."""
    return (
        "Run the same command again to go on from where it stopped, or do it by hand:\n"
        f"  1. download {SOURCES[name].url}\n"
        f"     (sha256 {SOURCES[name].sha256})\n"
        f"  2. put it at {file}\n"
        f"  3. vitface convert {name} --src {file} --out {out}"
    )


def download(url: str, sha256: str, file: Path) -> None:
    """Downloads `url` to `file`, going on from FILE.part if there is one; `file` appears only when it is right.

    OSError or HTTPException if the transfer breaks, which keeps the part; WeightsError if the sha256 is another, which
    deletes it.
    """
    part = file.with_name(file.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        _transfer(url, part, have)
    except urllib.error.HTTPError as error:
        error.close()
        # 416 says that nothing follows the part: it is complete, or no part of this file, which its sha256 tells
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
    found = sha256_file(part)
    if found != sha256:
        part.unlink()
        raise WeightsError(
            f"{url} arrived with sha256 {found}, not the pinned {sha256}: the download was deleted. Fetch again; if it "
            "stays so, the file was replaced at its source or on the way, and should not be used"
        )
    os.replace(part, file)


def _transfer(url: str, part: Path, have: int) -> None:
    """Appends to `part` what is missing after `have` bytes, or writes it anew if the server sends the whole file."""
    request = urllib.request.Request(url, headers={"User-Agent": f"vitface/{vitface.__version__}"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        resumed = response.status == http.client.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError(f"the server sent another range than the one after byte {have}; the next run starts anew")
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with (
            open(part, "ab" if resumed else "wb") as out,
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            while chunk := response.read(1 << 16):
                out.write(chunk)
                bar.update(len(chunk))
    size = part.stat().st_size
    if total is not None and size != total:
        raise OSError(f"the connection broke after {size} of {total} bytes")


def fetch_detector() -> Path:
    """Downloads YuNet, which `vitface align` uses, unless it is there; WeightsError if that fails."""
    assert DETECTOR.url is not None and DETECTOR.sha256 is not None
    file = cache_home() / "face_detection_yunet.onnx"
    if not file.is_file() or sha256_file(file) != DETECTOR.sha256:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            download(DETECTOR.url, DETECTOR.sha256, file)
        except (OSError, http.client.HTTPException) as error:
            raise WeightsError(
                f"cannot download {DETECTOR.url}: {error}\nDownload it by hand (sha256 {DETECTOR.sha256}) to {file}"
            ) from None
    return file
