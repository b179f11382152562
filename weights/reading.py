"""A checkpoint file -> its tensors by name, without running code from it.

Pickles are loaded with weights_only=True, a TorchScript archive only if its sha256 is that of one OpenAI published.
"""

import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitface.errors import WeightsError, in_one_line
from vitface.files import identify_file
from vitface.store.backbone import BACKBONE_FORMAT
from vitface.store.sources import SOURCES
from vitface.store.tensors import MAX_HEADER_BYTES
from vitface.weights.keymaps import common_prefix
from vitface.weights.layouts import clean, from_big_vision

MAX_PICKLE_BYTES = 64 << 20
_PICKLED = ("a zip", "a file of torch", "a pickle")
_TAKE = "take the .pt, .pth or .safetensors of the same weights (in an ONNX graph they have lost their names)"
# the names of the entry of a training checkpoint that holds the weights
WRAPPERS = (
    "state_dict",
    "model",
    "model_state_dict",
    "state_dict_backbone",
    "weights",
    "teacher",
    "model_ema",
    "student",
)


def read_source(path: Path, digest: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a safetensors file, a pickled state dict or OpenAI's archive, recognised by its contents; and
    which entry of a training checkpoint was taken, with the others that have tensors, "" if it has no entries.

    `digest` is the file's sha256. WeightsError if it cannot be read without running code from it.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        if int.from_bytes(head[:8], "little") > MAX_HEADER_BYTES:
            raise WeightsError(f"{path}: its header claims {int.from_bytes(head[:8], 'little'):,} bytes; it is damaged")
        state = _read_safetensors(path)
    elif path.suffix == ".npz":
        state = _read_npz(path)
    elif _is_torchscript(path):
        state = _read_openai_archive(path, digest)
    else:
        what, do = identify_file(path) or ("", "")
        if what and not what.startswith(_PICKLED):
            raise WeightsError(f"{path} holds no tensors by name but is {what}; {do or _TAKE}")
        state = _read_pickle(path)
    state, entry = _weights_entry(state)
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path} holds no tensors by name; a state dict is what can be converted")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise WeightsError(f"{path}: {key} is a {type(tensor).__name__}, not a tensor; save the state dict alone")
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not plain or not tensor.numel():
            raise WeightsError(f"{path}: {key} is empty, sparse, nested or without values; save it as a plain tensor")
    around = common_prefix(state)
    state = {key.removeprefix(around): tensor for key, tensor in state.items()}
    names = {clean(key): key for key in state}
    for key in state:
        if names[clean(key)] != key:
            raise WeightsError(f"{path}: {key} and {names[clean(key)]} are the same tensor under two names")
    return {clean(key): tensor for key, tensor in state.items()}, entry


def _weights_entry(state: object) -> tuple[object, str]:
    """The innermost entry of WRAPPERS in a checkpoint, and its name with those of the entries beside it."""
    taken, others = "", []
    while isinstance(state, dict) and (inside := [name for name in WRAPPERS if isinstance(state.get(name), dict)]):
        outside, state = state, state.pop(inside[0])  # taken out, as a pickle can hold itself
        beside = [key for key, value in outside.items() if key in inside or _has_tensors(value)]
        others += [in_one_line(f"{taken}{key}") for key in beside]
        taken += f"{inside[0]}."
    return state, taken.removesuffix(".") + f"; not taken: {', '.join(others)}" * bool(others)


def _has_tensors(entry: object) -> bool:
    return isinstance(entry, dict) and any(isinstance(value, Tensor) for value in entry.values())


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") == BACKBONE_FORMAT:
                raise WeightsError(f"{path} is a converted file already; use it as it is: --weights {path}")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
        raise WeightsError(f"{path}: damaged ({error}); download it again") from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if sum(entry.file_size for entry in archive.zip.infolist()) > path.stat().st_size:
                raise WeightsError(f"{path} is compressed; save it with numpy.savez, or the state dict as safetensors")
            return from_big_vision({name: torch.from_numpy(archive[name]) for name in archive.files})
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path}: damaged ({error}); download it again") from None


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.endswith("/constants.pkl") for entry in archive.namelist())
    except Exception:  # no archive, or a damaged one, which torch.load will report
        return False


def _read_openai_archive(path: Path, digest: str) -> dict[str, Tensor]:
    if digest not in {source.sha256 for source in SOURCES.values()}:
        raise WeightsError(
            f"{path} is a TorchScript archive, that is code, and not one OpenAI published (its sha256 is {digest}): "
            "it is not opened. Get the original with\n  vitface fetch clip\n"
            "or take a safetensors file of the same weights"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated")
        return dict(torch.jit.load(path, map_location="cpu").state_dict())  # noqa: TID251, its SHA-256 is published


def _check_pickle(path: Path) -> None:
    """WeightsError for a pickle that would ask for more memory than it fills: torch reads those of any size."""
    data, fault = b"", None
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type for entry in entries) or sum(e.file_size for e in entries) > path.stat().st_size:
                fault = "it is compressed, which torch.save never does"
            for entry in () if fault else (e for e in entries if e.filename.endswith("/data.pkl")):
                data += archive.read(entry)
    except Exception:  # no archive: the pickles come first in torch's older format
        with open(path, "rb") as file:
            data = file.read(MAX_PICKLE_BYTES)
    if b"bytearray" in data:  # the one callable that torch allows whose result can be of any size
        fault = "it makes a bytearray, which no state dict has"
    if fault:
        raise WeightsError(f"{path}: {fault}; it is not opened. Save the state dict alone, or as safetensors")


def _read_pickle(path: Path) -> object:
    _check_pickle(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251, the one place
    except pickle.UnpicklingError:
        raise WeightsError(
            f"{path} is not a file of plain tensors: it is something else, or code would have to run to load it "
            "(refused). Take the state dict alone, or a safetensors file of the same weights"
        ) from None
    except Exception as error:  # a damaged pickle can make its reader raise anything
        reason = str(error).split("\n")[0] or "it ends too early"
        raise WeightsError(f"{path}: damaged ({reason}); download it again") from None
