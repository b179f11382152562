"""LoRA folded into its backbone: W' = W + scaling · B A, a model without adapters that computes the same.

The sum is formed in float64 from the backbone file's float32, whatever precision the model runs in. DA-LoRA cannot be
folded: its weights differ from image to image.
"""

import dataclasses
from pathlib import Path

from vitface.errors import ExchangeError
from vitface.exchange.bundle import face_files
from vitface.files import sha256_bytes
from vitface.model.face import FaceModel
from vitface.model.lora import TARGETS, add_lora, merge_lora
from vitface.store.backbones import backbone_bytes, load_backbone, read_backbone
from vitface.store.faces import Checkpoint, trained_tensors


def merged_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """A face model's folder whose backbone has the adapters in it, and that backbone: file name -> contents.

    NAME.safetensors is a converted file like any other, for `--weights` and `load_backbone`. ExchangeError for DA-LoRA,
    and for a model without adapters or without a backbone file.
    """
    path, config, file = checkpoint.path, checkpoint.config, checkpoint.backbone
    if config.num_domains > 1 or not config.lora_rank:
        kind = "DA-LoRA, whose weights depend on the image" if config.lora_rank else "without adapters"
        raise ExchangeError(f"{path} is {kind}: there is nothing to merge; --format onnx keeps the router inside")
    if file == "random":
        raise ExchangeError(f"{path} was trained around random weights: there is no backbone file to merge into")
    model, vit = checkpoint.load(), load_backbone(config.backbone, file, config.vit.native_size)
    add_lora(vit, TARGETS[config.lora_targets], config.lora_rank, config.lora_alpha, config.lora_scaling)
    trained = trained_tensors(model)
    adapted = {key.removeprefix("vit."): tensor for key, tensor in trained.items() if key.startswith("vit.")}
    vit.load_state_dict({**vit.state_dict(), **adapted})
    merge_lora(vit)
    source = {**read_backbone(Path(file))[3], "merged": f"LoRA, model.safetensors with sha256 {checkpoint.sha256}"}
    backbone = backbone_bytes(config.backbone, config.vit, vit.state_dict(), source)
    plain = dataclasses.replace(config, weights_sha256=sha256_bytes(backbone), lora_rank=0, train_patch_embed=False)
    face = FaceModel(vit, plain)
    face.head = model.head
    return {f"{config.backbone}.safetensors": backbone, **face_files(face, None, checkpoint.calibration)}
