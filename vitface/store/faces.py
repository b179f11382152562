"""Face models on disk, each with every setting needed to run it, and all of it checked on load.

A face model is a checkpoint directory: what was trained (adapters, router, head), its `FaceConfig`, and a manifest of
SHA-256 sums. The frozen backbone stays in its own file, found again by its SHA-256. A checkpoint lies in a run's
`checkpoints/`, or is a folder of its own (a bundle: published, imported or merged) that has its thresholds with it.
"""

import dataclasses
import json
from pathlib import Path

from torch import Tensor

from vitface.config import Dtype, FaceConfig, backbone_name, read_config
from vitface.errors import CheckpointError
from vitface.files import sha256_file
from vitface.model.face import TOKEN_WIDTH, FaceModel
from vitface.store import hub
from vitface.store.backbones import backbone_files, contents_sha256, find_backbone, load_backbone, weights_sha256
from vitface.store.settings import face_config
from vitface.store.tensors import read_tensors

MODEL_FILES = ("model.safetensors", "model.json")  # what inference needs, and all that may be shared
THRESHOLDS_FILE = "thresholds.json"  # of a run directory, see vitface.training.holdout
FARS = (1e-2, 1e-3, 1e-4)


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
        raise CheckpointError(f"{path} is neither a run directory nor a checkpoint; train one with vitface train")
    verify_checkpoint(path, MODEL_FILES)
    return path


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run directory in `runs` whose checkpoints changed last; CheckpointError if there is none."""
    found = [path.parent for path in runs.glob("*/checkpoints") if (path / "last").exists()]
    if not found:
        raise CheckpointError(
            f"no trained run in {runs}/: train one, or name a checkpoint or a frozen backbone:\n"
            f"  vitface train --exp demo\n"
            f"  vitface evaluate --checkpoint RUN\n"
            f"  vitface evaluate --backbone dinov2 --image-size 224"
        )
    return max(found, key=lambda run: (run / "checkpoints" / "last").lstat().st_mtime)
