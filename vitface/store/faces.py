"""Face models on disk, each with every setting needed to run it, and all of it checked on load.

A face model is a checkpoint directory: what was trained (adapters, router, head), its `FaceConfig`, and a manifest of
SHA-256 sums. The frozen backbone stays in its own file, found again by its SHA-256. A checkpoint lies in a run's
`checkpoints/`, or is a folder of its own (a bundle: published, imported or merged) that has its thresholds with it.
"""

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from vitface.config import Dtype, FaceConfig, backbone_name
from vitface.errors import CheckpointError
from vitface.files import sha256_file
from vitface.model.face import TOKEN_WIDTH, FaceModel
from vitface.store import hub
from vitface.store.backbones import backbone_files, contents_sha256, find_backbone, load_backbone, weights_sha256
from vitface.store.settings import face_config, read_config
from vitface.store.tensors import read_tensors
from vitface.store.thresholds import cosines, read_calibration

MODEL_FILES = ("model.safetensors", "model.json")  # what inference needs, and all that may be shared
MANIFEST_FILE = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A face model on disk that is whole, with all that its files say of it.

    `path` is what the user named, `folder` where the model files lie, which `manifest` describes, and `run` the run
    directory around it, None for a bundle. `settings` are those the run was started with, {} without a run, and
    `calibration` is as `read_calibration` gives it. `weights` names the backbone's file if the user did.
    """

    path: Path
    folder: Path
    run: Path | None
    manifest: dict[str, Any]
    config: FaceConfig
    settings: dict[str, Any]
    calibration: dict[str, Any] | None
    weights: str | Path | None = None

    @property
    def sha256(self) -> str:
        """The SHA-256 of the trained tensors, by which scores, thresholds and galleries know their model."""
        return self.manifest["files"]["model.safetensors"]["sha256"]

    @property
    def thresholds(self) -> dict[float, float]:
        """{FAR: cosine} calibrated for this very checkpoint, empty if there are none."""
        return cosines(self.calibration)

    @property
    def is_best(self) -> bool:
        """Whether it is its run's best."""
        return self.run is not None and (self.run / "checkpoints" / "best").resolve() == self.folder

    @cached_property
    def backbone(self) -> str | Path:
        """The frozen backbone's file, "random" if there is none: `weights`, else whichever is the right one of the file
        beside the checkpoint, the one that the run was started with, and `backbone_files`.

        CheckpointError if there are such files, but none is the right one; WeightsError if there is none.
        """
        config, recorded = self.config, self.settings.get("weights")
        if config.weights_sha256 == "random":
            return "random"
        usual = [self.folder / f"{config.backbone}.safetensors", *([Path(recorded)] if recorded else [])]
        found = [*filter(Path.is_file, usual), *backbone_files(config.backbone)]
        places = [Path(self.weights)] if self.weights else found or [find_backbone(config.backbone)]
        contents = self.manifest.get("backbone_sha256")
        for path in filter(Path.is_file, places):
            if sha256_file(path) == config.weights_sha256 or (contents and contents_sha256(path) == contents):
                return path
        raise CheckpointError(
            f"{self.path} was trained on a {config.backbone} file with sha256 {config.weights_sha256[:16]}..., which "
            f"is not {' nor '.join(map(str, places))}; name the right file with --weights FILE"
        )

    def load(self, dtype: Dtype | None = None) -> FaceModel:
        """The model in eval mode, on the CPU; `dtype` runs its frozen part in another precision than the stored one.

        CheckpointError if the tensors or the backbone do not fit the settings; the errors of `backbone`.
        """
        config = self.config if dtype is None else dataclasses.replace(self.config, dtype=dtype)
        vit = load_backbone(config.backbone, self.backbone, config.image_size)
        if vit.config != config.vit:
            raise CheckpointError(f"{self.path}: model.json describes another {config.backbone} than the backbone file")
        _check_size(config, self.folder / "model.safetensors")
        model = FaceModel(vit, config)
        load_trained(model, self.folder / "model.safetensors")
        return model.eval()


def open_checkpoint(path: str | Path, weights: str | Path | None = None) -> Checkpoint:
    """The checkpoint that `path` names: a run directory (its best), one step directory of it, a bundle, or a repository
    `owner/name` (`owner/name@revision`) on the Hugging Face Hub.

    CheckpointError if it is none, if a file is missing or damaged, or if the settings are no model's.
    """
    path = Path(path)
    folder = hub.download(path) if not path.exists() and hub.is_repository(path) else path
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints" / "best"
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is neither a run directory nor a checkpoint; train one with vitface train")
    folder = folder.resolve()  # a run that is still training may point `best` elsewhere at any time
    manifest, config = read_manifest(folder, MODEL_FILES), read_face_config(folder)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else None
    settings = {} if run is None else read_config(run)
    calibration = read_calibration(run or folder, manifest["files"]["model.safetensors"]["sha256"])
    return Checkpoint(path, folder, run, manifest, config, settings, calibration, weights)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is one checkpoint directory, whole or not, and no run."""
    return (path / MANIFEST_FILE).is_file()


def read_manifest(folder: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """The manifest of a checkpoint directory, {"files": {name: {"size", "sha256"}}, ...}.

    CheckpointError unless these `files` are the ones that it describes.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
        for name in files:
            file, sealed = folder / name, manifest["files"][name]
            if file.stat().st_size != sealed["size"] or sha256_file(file) != sealed["sha256"]:
                raise CheckpointError(f"{file} is damaged: it differs from what {folder.name}/manifest.json sealed")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: no {Path(str(error.filename)).name}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise CheckpointError(f"{folder}/manifest.json is damaged") from None
    return manifest


def read_face_config(folder: Path) -> FaceConfig:
    """The settings of a checkpoint directory; CheckpointError if they cannot be those of a model."""
    try:
        return face_config(json.loads((folder / "model.json").read_text(encoding="utf-8")))
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}/model.json was not written by this version of vitface ({error})") from None


def _check_size(config: FaceConfig, path: Path) -> None:
    """CheckpointError if the settings ask for more than `path` can hold, before memory is asked for."""
    dim = config.vit.embed_dim
    width = (1 + config.vit.grid(config.image_size) ** 2) * TOKEN_WIDTH if config.head == "patches" else dim
    head = 0 if config.head == "cls" else width * config.embedding_dim
    adapters = config.vit.depth * config.lora_rank * config.num_domains * dim
    if 4 * (head + adapters) > path.stat().st_size:
        raise CheckpointError(f"{path} is smaller than the model that model.json describes")


def trained_tensors(model: FaceModel) -> dict[str, Tensor]:
    """What a checkpoint keeps of a face model, by state-dict name: all but the frozen parameters of the backbone."""
    frozen = {f"vit.{name}" for name, parameter in model.vit.named_parameters() if not parameter.requires_grad}
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
