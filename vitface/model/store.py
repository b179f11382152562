"""Models on disk, each with every setting needed to run it, and all of it checked on load.

A backbone is one safetensors file: our state-dict names at the native grid, and the settings (`ViTConfig`) and origin
as JSON in its metadata. Source checkpoints (Meta's .pth, OpenAI's archive, ...) are not read here: weights/ converts
them.

A face model is a checkpoint directory: what was trained (adapters, router, head), its `FaceConfig`, and a manifest of
SHA-256 sums. The frozen backbone stays in its own file, found again by its SHA-256. A checkpoint lies in a run's
`checkpoints/`, or is a folder of its own (a bundle: published, imported or merged) that has its thresholds with it.
"""

import dataclasses
import hashlib
import importlib.util
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from vitface.config import (
    VIT_PRESETS,
    Dtype,
    FaceConfig,
    ViTConfig,
    backbone_name,
    read_config,
)
from vitface.errors import CheckpointError, WeightsError
from vitface.files import replace_file
from vitface.home import cache_home
from vitface.model import hub
from vitface.model.face import TOKEN_WIDTH, FaceModel
from vitface.model.settings import face_config, vit_config
from vitface.model.vit import ViT, init_weights, resample_pos_embed
from vitface.version import __version__

BACKBONE_FORMAT = "vitface-backbone-1"
MAX_HEADER_BYTES = 1 << 20
MODEL_FILES = ("model.safetensors", "model.json")  # what inference needs, and all that may be shared
THRESHOLDS_FILE = "thresholds.json"  # of a run directory, see vitface.training.holdout
FARS = (1e-2, 1e-3, 1e-4)


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file's contents; written by us, as safetensors' own writer does not fsync."""
    return save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, metadata)


def backbone_bytes(name: str, config: ViTConfig, tensors: dict[str, Tensor], source: dict[str, str]) -> bytes:
    """A backbone file's contents.

    `tensors` are named and shaped as `ViT(config, config.native_size)` has them. `source` says where they came from:
    file, sha256, licence and anything else worth keeping.
    """
    metadata = {
        "format": BACKBONE_FORMAT,
        "name": name,
        "config": json.dumps(dataclasses.asdict(config)),
        "source": json.dumps(source),
        "vitface_version": __version__,
    }
    return tensor_bytes(tensors, metadata)


def save_backbone(path: Path, name: str, config: ViTConfig, tensors: dict[str, Tensor], source: dict[str, str]) -> None:
    """Writes a backbone file, see `backbone_bytes`, whole or not at all."""
    replace_file(path, backbone_bytes(name, config, tensors, source))


def read_backbone(path: Path) -> tuple[str, ViTConfig, dict[str, Tensor], dict[str, str]]:
    """(name, config, tensors, source) of a converted file; WeightsError says what to do about any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == BACKBONE_FORMAT:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dict
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        if path.suffix == ".safetensors":
            raise WeightsError(f"{path}: damaged ({error}); fetch or convert it again") from None
        metadata = {}
    if metadata.get("format") != BACKBONE_FORMAT:
        raise WeightsError(
            f"{path} is not a converted file; convert it first:\n"
            f"  python -m vitface.weights.convert NAME --src {path} --out weights/NAME.safetensors\n"
            f"with NAME one of {', '.join(VIT_PRESETS)}"
        )
    try:
        return metadata["name"], vit_config(json.loads(metadata["config"])), tensors, json.loads(metadata["source"])
    except (KeyError, TypeError, ValueError):
        raise WeightsError(f"{path} has settings that this version does not know; convert the source again") from None


def backbone_files(name: str) -> list[Path]:
    """Every NAME.safetensors there is in ./weights, $VITFACE_HOME (default ~/.cache/vitface) and the package."""
    packaged = importlib.util.find_spec("vitface.weights")  # absent in a clone that was not installed
    folders = [Path("weights"), cache_home(), *(packaged.submodule_search_locations or [] if packaged else [])]
    return [path for path in (Path(folder) / f"{name}.safetensors" for folder in folders) if path.is_file()]


def find_backbone(name: str) -> Path:
    """The first of `backbone_files`; WeightsError names the places and the fetch command."""
    for path in backbone_files(name):
        return path
    raise WeightsError(
        f"no weights for {name}: looked for {name}.safetensors in ./weights, {cache_home()} and the package. "
        "Get them with\n"
        f"  python -m vitface.weights.fetch {name}\n"
        f"or name a converted file with --weights FILE"
    )


def contents_sha256(path: Path) -> str:
    """The SHA-256 of what a backbone file means: its settings and, in the order of their names, its tensors.

    Files of the same weights differ in their bytes where another version of vitface converted them, or another source.
    """
    _, config, tensors, _ = read_backbone(path)
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(config), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.float().numpy().tobytes())
    return digest.hexdigest()


def load_backbone(name: str, weights: str | Path | None = None, image_size: int = 224) -> ViT:
    """A frozen-ready ViT in float32 and eval mode for square images of `image_size` pixels.

    `weights`: None looks for NAME.safetensors (see `find_backbone`), a path loads that file, "random" initialises as a
    pure function of the name. Called on normalised float (B, 3, S, S) it gives final-norm tokens (B, N, D), CLS first.
    `vit.config` holds the settings, which come from the file where there is one.
    """
    name = backbone_name(name)
    if weights == "random":
        vit = ViT(VIT_PRESETS[name], image_size)
        init_weights(vit)
        return vit.eval()
    path = find_backbone(name) if weights is None else Path(weights)
    stored_name, config, tensors, _ = read_backbone(path)
    if stored_name != name:
        raise WeightsError(f"{path} holds {stored_name}, not {name}; pass --backbone {stored_name}")
    check_tensors(path, tensors, expected_tensors(config))
    tensors["pos_embed"] = resample_pos_embed(tensors["pos_embed"], config.grid(image_size), config.pos_interp)
    vit = ViT(config, image_size)
    vit.load_state_dict(tensors)
    return vit.eval()


def expected_tensors(config: ViTConfig) -> dict[str, Tensor]:
    """The tensors a backbone file of this config holds, on the meta device."""
    with torch.device("meta"):
        return ViT(config, config.native_size).state_dict()


def check_tensors(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """WeightsError unless `tensors` has exactly these names, shapes and kinds of dtype, all finite."""
    fault = _first_fault(tensors, expected, exact_dtype=False)
    if fault:
        raise WeightsError(f"{path}: {fault}; fetch or convert the file again")


def _first_fault(tensors: dict[str, Tensor], expected: dict[str, Tensor], exact_dtype: bool) -> str | None:
    for key in sorted(expected.keys() ^ tensors.keys()):
        return f"{'missing' if key in expected else 'unknown'} tensor {key}"
    for key, tensor in tensors.items():
        want = expected[key]
        same_kind = tensor.is_floating_point() == want.is_floating_point()
        if tensor.shape != want.shape or not (tensor.dtype == want.dtype if exact_dtype else same_kind):
            return f"{key} is {tensor.dtype} {tuple(tensor.shape)}, expected {want.dtype} {tuple(want.shape)}"
        if not tensor.isfinite().all():
            return f"{key} has NaN or infinite values"
    return None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file from anybody; CheckpointError if it is none, or has a header of over 1 MB."""
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: damaged, or not ours: its header claims {header:,} bytes")
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def read_tensors(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's safetensors file: exactly the names, shapes and dtypes of `expected`, all finite.

    CheckpointError for any other file; a header of more than 1 MB is not even parsed.
    """
    tensors = load_tensors(path)
    fault = _first_fault(tensors, expected, exact_dtype=True)
    if fault:
        raise CheckpointError(f"{path}: {fault}; it is not of the model that its settings describe")
    return tensors


def trained_tensors(model: FaceModel) -> dict[str, Tensor]:
    """What a checkpoint keeps of a face model: trained parameters and running statistics, by state-dict name."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained(model: FaceModel, path: Path) -> None:
    """Puts model.safetensors into its model; CheckpointError as `read_tensors`, with the model as it was."""
    model.load_state_dict(read_tensors(path, trained_tensors(model)), strict=False)  # the frozen ones are not in it


def frozen_face(
    name: str, weights: str | Path | None = None, image_size: int = 224, dtype: Dtype = "fp32"
) -> FaceModel:
    """The frozen backbone as a face model: the embedding is the raw CLS token."""
    vit = load_backbone(name, weights, image_size)
    digest = weights_sha256(backbone_name(name), weights)
    config = FaceConfig(
        backbone_name(name), digest, vit.config, image_size, embedding_dim=vit.config.embed_dim, dtype=dtype
    )
    return FaceModel(vit, config).eval()


def weights_sha256(name: str, weights: str | Path | None) -> str:
    """The SHA-256 of the backbone file that `load_backbone` would load, or "random"."""
    return "random" if weights == "random" else sha256_file(find_backbone(name) if weights is None else Path(weights))


def load_face(path: str | Path, weights: str | Path | None = None, dtype: Dtype | None = None) -> FaceModel:
    """The face model of a run directory (its best checkpoint), of one checkpoint directory, or of a repository
    `owner/name` (`owner/name@revision`) on the Hugging Face Hub, in eval mode.

    `weights` names the frozen backbone's file; by default the file the run was trained with is looked for where it was,
    then in the usual places. `dtype` runs the frozen part in another precision than the stored one. CheckpointError if
    the checkpoint is not whole or fits no such backbone.
    """
    step = find_checkpoint(Path(path))
    config = read_face_config(step)
    config = config if dtype is None else dataclasses.replace(config, dtype=dtype)
    vit = load_backbone(config.backbone, backbone_of(step, config, weights), config.image_size)
    if vit.config != config.vit:
        raise CheckpointError(f"{step}/model.json describes another {config.backbone} than the backbone file")
    _check_size(config, step / "model.safetensors")
    model = FaceModel(vit, config)
    load_trained(model, step / "model.safetensors")
    model.thresholds = read_thresholds(step)
    return model.eval()


def read_face_config(step: Path) -> FaceConfig:
    """The settings of a checkpoint directory; CheckpointError if they cannot be those of a model."""
    try:
        return face_config(json.loads((step / "model.json").read_text(encoding="utf-8")))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{step}/model.json was not written by this version of vitface ({error})") from None


def _check_size(config: FaceConfig, path: Path) -> None:
    """CheckpointError if the settings ask for more than `path` can hold, before memory is asked for."""
    dim = config.vit.embed_dim
    width = (1 + config.vit.grid(config.image_size) ** 2) * TOKEN_WIDTH if config.head == "patches" else dim
    head = 0 if config.head == "cls" else width * config.embedding_dim
    adapters = config.vit.depth * config.lora_rank * config.num_domains * dim
    if 4 * (head + adapters) > path.stat().st_size:
        raise CheckpointError(f"{path} is smaller than the model that model.json describes")


def model_sha256(path: Path) -> str:
    """The SHA-256 of the trained tensors of a run's best checkpoint, or of one checkpoint, from its manifest."""
    manifest = json.loads((find_checkpoint(path) / "manifest.json").read_text())
    return manifest["files"]["model.safetensors"]["sha256"]


def read_thresholds(step: Path) -> dict[float, float]:
    """{FAR: cosine} calibrated for this very checkpoint; empty if its run has none for it.

    CheckpointError if the run's file is damaged.
    """
    path = run_folder(step) / THRESHOLDS_FILE
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        if written["model"] != model_sha256(step):
            return {}
        entries = written["thresholds"].items()
        return {float(far): float(entry["threshold"]) for far, entry in entries if "threshold" in entry}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is damaged; delete it, the model works without") from None


def backbone_of(step: Path, config: FaceConfig, weights: str | Path | None = None) -> str | Path:
    """The backbone file of a checkpoint directory, "random" if it has none: `weights`, else the file beside it, the one
    that the run was started with, or one of `backbone_files`, whichever is the right one.

    CheckpointError if there are such files, but none is the right one; WeightsError if there is none.
    """
    if config.weights_sha256 == "random":
        return "random"
    recorded = read_config(run_folder(step)).get("weights")
    usual = [step / f"{config.backbone}.safetensors", *([Path(recorded)] if recorded else [])]
    places = [Path(weights)] if weights else [*filter(Path.is_file, usual), *backbone_files(config.backbone)]
    contents = json.loads((step / "manifest.json").read_text()).get("backbone_sha256")
    for path in filter(Path.is_file, places or [find_backbone(config.backbone)]):
        if sha256_file(path) == config.weights_sha256 or (contents and contents_sha256(path) == contents):
            return path
    raise CheckpointError(
        f"{step} was trained on a {config.backbone} file with sha256 {config.weights_sha256[:16]}..., which is not "
        f"{' nor '.join(map(str, places))}; name the right file with --weights FILE"
    )


def run_folder(step: Path) -> Path:
    """Where the settings and thresholds of a checkpoint directory lie: its run, or itself if it is in no run."""
    folder = step.resolve().parent
    return folder.parent if folder.name == "checkpoints" else step


def verify_checkpoint(path: Path, files: tuple[str, ...]) -> None:
    """CheckpointError unless these files of one step directory are the ones that its manifest sealed."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in files:
            file, sealed = path / name, manifest["files"][name]
            if file.stat().st_size != sealed["size"] or sha256_file(file) != sealed["sha256"]:
                raise CheckpointError(f"{file} is damaged: it differs from what {path.name}/manifest.json sealed")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: no {Path(str(error.filename)).name}") from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise CheckpointError(f"{path}/manifest.json is damaged") from None


def find_checkpoint(path: Path) -> Path:
    """Where the model files of `path` lie, which is a run (its best), a checkpoint, or on the Hub; they verify."""
    if not path.exists() and hub.is_repository(path):
        path = hub.download(path)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / "best"
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a run directory nor a checkpoint; train one with python train.py")
    verify_checkpoint(path, MODEL_FILES)
    return path


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run directory in `runs` whose checkpoints changed last; CheckpointError if there is none."""
    found = [path.parent for path in runs.glob("*/checkpoints") if (path / "last").exists()]
    if not found:
        raise CheckpointError(
            f"no trained run in {runs}/: train one, or name a checkpoint or a frozen backbone:\n"
            f"  python train.py --exp demo\n"
            f"  python evaluate.py --checkpoint RUN\n"
            f"  python evaluate.py --backbone dinov2 --image-size 224"
        )
    return max(found, key=lambda run: (run / "checkpoints" / "last").lstat().st_mtime)
