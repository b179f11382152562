"""The address, SHA-256 and licence of each backbone's original file."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """`url` and `sha256` are None where no original is pinned: such a backbone is converted from a file one has.

    `transformers` and `timm` are the same weights' repositories on the Hugging Face Hub, None where there is none.
    """

    origin: str
    licence: str
    url: str | None = None
    sha256: str | None = None
    transformers: str | None = None
    timm: str | None = None


def _dinov2(file: str, sha256: str, size: str) -> Source:
    url = f"https://dl.fbaipublicfiles.com/dinov2/{file}"
    hub = f"facebook/dinov2-{size}", f"timm/vit_{size}_patch14_dinov2.lvd142m"
    return Source("Meta's DINOv2", "Apache-2.0", url, sha256, *hub)


def _clip(file: str, sha256: str, size: str, patch: int) -> Source:
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
    hub = f"openai/clip-vit-{size}-patch{patch}", f"timm/vit_{size}_patch{patch}_clip_224.openai"
    return Source("OpenAI's CLIP", "MIT", url, sha256, *hub)


DETECTOR = Source(  # version 2026may, by its commit; Git LFS, so not at the address of the repository's text
    "OpenCV Zoo's YuNet",
    "MIT",
    "https://media.githubusercontent.com/media/opencv/opencv_zoo/47534e27c9851bb1128ccc0102f1145e27f23f98/"
    "models/face_detection_yunet/face_detection_yunet_2026may.onnx",
    "ebafce4e3c118d6554634be5c27ab333b4c047a9a8c3faf1d7cf93101c22f0f0",
)
SOURCES: dict[str, Source] = {
    "dinov2_vits14": _dinov2(
        "dinov2_vits14/dinov2_vits14_pretrain.pth",
        "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
        "small",
    ),
    "dinov2_vitb14": _dinov2(
        "dinov2_vitb14/dinov2_vitb14_pretrain.pth",
        "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73",
        "base",
    ),
    "dinov2_vitl14": _dinov2(
        "dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        "large",
    ),
    "clip_vitb16": _clip("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "base", 16),
    "clip_vitl14": _clip(
        "ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "large", 14
    ),
    "vit_tiny_patch16": Source(
        "timm's vit_tiny_patch16_224 (AugReg)", "Apache-2.0", timm="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    ),
}
