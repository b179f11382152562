"""Turns a published checkpoint into a backbone file: our names, float32, every setting in the metadata.

Every tensor of the source is used exactly once or is listed in `keymaps` as not used, and every tensor of the model is
filled; anything else is an error that names the tensor. Reading a file never runs code from it: pickles are loaded with
weights_only=True, a TorchScript archive only if its sha256 is that of one OpenAI published.
"""

import dataclasses
import pickle
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitface.errors import WeightsError
from vitface.files import sha256_file
from vitface.presets import VIT_PRESETS, ViTConfig, backbone_name
from vitface.store.backbones import BACKBONE_FORMAT, expected_tensors, save_backbone
from vitface.store.tensors import MAX_HEADER_BYTES
from vitface.weights.keymaps import FAMILIES, Family, find_family
from vitface.weights.sources import SOURCES

MAX_PICKLE_BYTES = 64 << 20
WRAPPERS = ("state_dict", "model")  # the names of the entry of a training checkpoint that holds the weights


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion. `dropped` counts the source tensors not used, by the pattern that lists them."""

    name: str
    config: ViTConfig
    src: Path
    out: Path
    family: str
    sha256: str
    published: bool
    used: int
    dropped: dict[str, int]


def convert_backbone(name: str, src: str | Path, out: str | Path, act: str | None = None) -> Conversion:
    """Converts the checkpoint `src` into the backbone file `out`, which is replaced only by a complete file.

    `name` is a preset or its alias. `act`, "gelu" or "quick_gelu", overrides the preset's activation, which no
    checkpoint names: open_clip's LAION and DataComp weights have the exact GELU. WeightsError names what does not fit.
    """
    name = backbone_name(name)
    if name not in SOURCES:
        raise WeightsError(f"{name} ships with the package as a converted file: there is nothing to convert")
    config = VIT_PRESETS[name] if act is None else dataclasses.replace(VIT_PRESETS[name], act=act)
    return convert_file(name, config, Path(src), Path(out))


def convert_file(name: str, config: ViTConfig, src: Path, out: Path) -> Conversion:
    """`convert_backbone` for any sizes: `config` describes the model in `src`."""
    if not src.is_file():
        hint = "; name the file inside, such as model.safetensors" if src.is_dir() else ""
        raise WeightsError(f"{src}: no such file{hint}")
    if out.is_dir() or out.resolve() == src.resolve():
        raise WeightsError(f"--out {out} is {'a folder' if out.is_dir() else 'the source itself'}; name another file")
    digest = sha256_file(src)
    published = digest == SOURCES[name].sha256
    state = read_source(src, digest)
    family, tensors, dropped = map_tensors(src, state, name, config)
    licence = f"{SOURCES[name].licence} ({SOURCES[name].origin})"
    source = {
        "file": src.name,
        "sha256": digest,
        "family": family.title,
        "licence": licence if published else f"{licence}, if it holds those weights: its sha256 is not a pinned one",
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_backbone(out, name, config, tensors, source)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"cannot write {out}: {error}") from None
    used = len(state) - sum(dropped.values())
    return Conversion(name, config, src, out, family.title, digest, published, used, dropped)


def read_source(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, a pickled state dict or OpenAI's archive, recognised by its contents.

    `digest` is the file's sha256. WeightsError if it cannot be read without running code from it.
    """
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":
        if int.from_bytes(head[:8], "little") > MAX_HEADER_BYTES:
            raise WeightsError(f"{path}: its header claims {int.from_bytes(head[:8], 'little'):,} bytes; it is damaged")
        state = _read_safetensors(path)
    elif _is_torchscript(path):
        state = _read_openai_archive(path, digest)
    else:
        state = _read_pickle(path)
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state:
        raise WeightsError(f"{path} holds no tensors by name; a state dict is what can be converted")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise WeightsError(f"{path}: {key} is a {type(tensor).__name__}, not a tensor; save the state dict alone")
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not plain or not tensor.numel():
            raise WeightsError(f"{path}: {key} is empty, sparse, nested or without values; save it as a plain tensor")
    wrapped = all(key.startswith("module.") for key in state)  # by DistributedDataParallel
    return {key.removeprefix("module.") if wrapped else key: tensor for key, tensor in state.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") == BACKBONE_FORMAT:
                raise WeightsError(f"{path} is a converted file already; use it as it is: --weights {path}")
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except SafetensorError as error:
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


def map_tensors(
    path: Path, state: dict[str, Tensor], name: str, config: ViTConfig
) -> tuple[Family, dict[str, Tensor], dict[str, int]]:
    """Renames, fuses and casts a source's tensors: (family, ours, how many each pattern dropped).

    WeightsError names the first tensor that is unknown, missing, there twice, of another shape, or not finite.
    """
    found = find_family(set(state))
    if found is None:
        known = ", ".join(family.title for family in FAMILIES)
        raise WeightsError(f"{path} has none of the known layouts ({known}); it begins with {', '.join([*state][:3])}")
    family, prefix = found
    assigned, dropped = _assign(path, state, family, prefix)
    _check_preset(path, state, assigned, name, config)
    ours = {}
    for target, want in expected_tensors(config).items():
        marks = [mark for mark in ("", "[q]", "[k]", "[v]") if family.source_names(target + mark)]
        if not marks:
            raise WeightsError(f"{path}: {name} needs {target}, which {family.title} files do not have")
        pieces = []
        for mark in marks:
            if target + mark not in assigned:
                names = " or ".join(prefix + key for key in family.source_names(target + mark))
                raise WeightsError(f"{path}: {names} is missing, which {name} needs for {target}")
            key = assigned.pop(target + mark)
            shape = torch.Size([want.shape[0] // 3, *want.shape[1:]]) if mark else want.shape
            pieces.append(_checked(path, key, state[key], target, shape))
        ours[target] = torch.cat(pieces)  # a copy, so that no two tensors share memory in the file
    for target, key in assigned.items():
        raise WeightsError(f"{path}: {name} has no place for {key} (it would be {target})")
    return family, ours, dropped


def _assign(path: Path, state: dict[str, Tensor], family: Family, prefix: str) -> tuple[dict[str, str], dict[str, int]]:
    """({our name with its mark: the source's name}, how many each pattern dropped); WeightsError names any other."""
    assigned: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    targets = family.targets(state, prefix)
    for key in state:
        inside, bare = key.startswith(prefix), key.removeprefix(prefix)
        if bare in family.registers:
            raise WeightsError(f"{path} has register tokens ({key}); take the variant without registers")
        target = targets.get(key)
        unused = [p for p in (family.dropped if inside else family.outside) if fnmatchcase(bare, p)]
        if target is not None and target in assigned:
            raise WeightsError(f"{path}: {assigned[target]} and {key} are the same tensor under two names")
        if target is not None:
            assigned[target] = key
        elif unused:
            dropped[prefix + unused[0] if inside else unused[0]] += 1
        else:
            raise WeightsError(f"{path}: {key} is unknown in a {family.title} file; nothing was converted")
    return assigned, dict(dropped)


def _check_preset(path: Path, state: dict[str, Tensor], assigned: dict[str, str], name: str, config: ViTConfig) -> None:
    """WeightsError with the right name if the sizes in the file are those of another preset."""
    patch = assigned.get("patch_embed.proj.weight")
    width = state[assigned["cls_token"]].numel()
    depth = len({target.split(".")[1] for target in assigned if target.startswith("blocks.")})
    found = (width, depth, state[patch].shape[-1:] if patch else (), "blocks.0.ls1.gamma" in assigned)
    known = {**VIT_PRESETS, name: config}
    fits = [key for key, c in known.items() if found == (c.embed_dim, c.depth, (c.patch_size,), c.layer_scale)]
    if fits and name not in fits:
        size = f"it has {depth} blocks of width {width}"
        raise WeightsError(f"{path} is not a {name}: {size}; convert it as {' or '.join(fits)}")


def _checked(path: Path, key: str, tensor: Tensor, target: str, shape: torch.Size) -> Tensor:
    """`tensor` in float32 and in our shape, or WeightsError."""
    if target in ("cls_token", "pos_embed") and tensor.dim() in (1, 2):  # CLIP's are (D,) and (N, D)
        tensor = tensor.reshape(1, -1, tensor.shape[-1])
    if tensor.shape != shape or not tensor.is_floating_point():
        raise WeightsError(f"{path}: {key} is {tensor.dtype} {tuple(tensor.shape)}, expected {tuple(shape)} of floats")
    tensor = tensor.to(torch.float32)
    if not tensor.isfinite().all():
        raise WeightsError(f"{path}: {key} has NaN or infinite values; download it again")
    return tensor
