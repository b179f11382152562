"""The address, SHA-256 and licence of each original file."""

from dataclasses import dataclass

from vitface.extras import YUNET_SHA256


@dataclass(frozen=True)
class Source:
    """An original file and where it comes from.

    `url` and `sha256` are None where no original is pinned: such a backbone is converted from a file the user has.
    `transformers` and `timm` are the same weights' repositories on the Hugging Face Hub, None where there is none.
    """

    origin: str
    licence: str
    url: str | None = None
    sha256: str | None = None
    transformers: str | None = None
    timm: str | None = None


def _dinov2(size: str, sha256: str) -> Source:
    name = f"dinov2_vit{size[0]}14"
    url = f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth"
    hub = f"facebook/dinov2-{size}", f"timm/vit_{size}_patch14_dinov2.lvd142m"
    return Source("Meta's DINOv2", "Apache-2.0", url, sha256, *hub)


def _clip(size: str, patch: int, sha256: str) -> Source:
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/ViT-{size[0].upper()}-{patch}.pt"
    hub = f"openai/clip-vit-{size}-patch{patch}", f"timm/vit_{size}_patch{patch}_clip_224.openai"
    return Source("OpenAI's CLIP", "MIT", url, sha256, *hub)


DETECTOR = Source(  # version 2026may, by its commit; the address is that of Git LFS, which stores the file
    "OpenCV Zoo's YuNet",
    "MIT",
    "https://media.githubusercontent.com/media/opencv/opencv_zoo/47534e27c9851bb1128ccc0102f1145e27f23f98/"
    "models/face_detection_yunet/face_detection_yunet_2026may.onnx",
    YUNET_SHA256,
)
SOURCES: dict[str, Source] = {
    "dinov2_vits14": _dinov2("small", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": _dinov2("base", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": _dinov2("large", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "clip_vitb16": _clip("base", 16, "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "clip_vitl14": _clip("large", 14, "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "vit_tiny_patch16": Source(
        "timm's vit_tiny_patch16_224 (AugReg)", "Apache-2.0", timm="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    ),
}
