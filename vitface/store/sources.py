"""The address, SHA-256 and licence of each original file."""

from dataclasses import dataclass

from vitface.errors import command
from vitface.extras import YUNET_SHA256
from vitface.files import cache_home


@dataclass(frozen=True)
class Source:
    """An original file and where it comes from.

    `url` and `sha256` are None where no original is pinned: such a backbone is converted from a file the user has,
    which `page` tells where to get.
    `transformers` and `timm` are the same weights' repositories on the Hugging Face Hub, None where there is none.
    """

    origin: str
    licence: str
    url: str | None = None
    sha256: str | None = None
    transformers: str | None = None
    timm: str | None = None
    page: str | None = None


def _dinov2(size: str, sha256: str) -> Source:
    name = f"dinov2_vit{size[0]}14"
    url = f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth"
    hub = f"facebook/dinov2-{size}", f"timm/vit_{size}_patch14_dinov2.lvd142m"
    return Source("Meta's DINOv2", "Apache-2.0", url, sha256, *hub)


def _clip(size: str, patch: int, sha256: str, pixels: int = 224) -> Source:
    end, hub_end = ("", "") if pixels == 224 else (f"-{pixels}px", f"-{pixels}")
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/ViT-{size[0].upper()}-{patch}{end}.pt"
    hub = f"openai/clip-vit-{size}-patch{patch}{hub_end}", f"timm/vit_{size}_patch{patch}_clip_{pixels}.openai"
    return Source("OpenAI's CLIP", "MIT", url, sha256, *hub)


def _dinov2_reg(size: str) -> Source:
    name = f"dinov2_vit{size[0]}14"
    page = f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_reg4_pretrain.pth"
    hub = f"facebook/dinov2-with-registers-{size}", f"timm/vit_{size}_patch14_reg4_dinov2.lvd142m"
    return Source("Meta's DINOv2 with registers", "Apache-2.0", None, None, *hub, page)


def _dinov3(size: str, timm: str) -> Source:
    repository = f"facebook/dinov3-{size}-pretrain-lvd1689m"
    page = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
    return Source("Meta's DINOv3", "DINOv3 License", None, None, repository, f"timm/{timm}_dinov3.lvd1689m", page)


def _pe(size: str, resolution: str) -> Source:
    repository = f"facebook/PE-Core-{size}-{resolution}"
    sizes = {"T": "tiny", "S": "small", "B": "base"}
    timm = f"timm/vit_pe_core_{sizes[size[0]]}_patch16_{resolution}.fb"
    page = f"https://huggingface.co/{repository}"
    return Source("Meta's Perception Encoder", "Apache-2.0", None, None, None, timm, page)


FACES_LICENCE = "for non-commercial research only, and under the terms of the faces they were trained on"


def _lvface(size: str, sha256: str | None = None) -> Source:
    page, name = "https://huggingface.co/bytedance-research/LVFace", f"LVFace-{size}_Glint360K"
    url = f"{page}/resolve/main/{name}/{name}.pt" if sha256 else None
    return Source("ByteDance's LVFace, trained on Glint360K", FACES_LICENCE, url, sha256, page=page)


def _adaface(size: str, sha256: str | None = None) -> Source:
    page = f"https://huggingface.co/minchul/cvlface_adaface_vit_{size}_webface4m"
    url = f"{page}/resolve/main/model.safetensors" if sha256 else None
    return Source("CVLface's AdaFace, trained on WebFace4M", FACES_LICENCE, url, sha256, page=page)


DETECTOR = Source(  # version 2026may, by its commit; the address is that of Git LFS, which stores the file
    "OpenCV Zoo's YuNet",
    "MIT",
    "https://media.githubusercontent.com/media/opencv/opencv_zoo/47534e27c9851bb1128ccc0102f1145e27f23f98/"
    "models/face_detection_yunet/face_detection_yunet_2026may.onnx",
    YUNET_SHA256,
)
RUNTIME = Source(
    "Microsoft's ONNX Runtime Web 1.30.0",
    "MIT",
    "https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz",
    "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
)
SOURCES: dict[str, Source] = {
    "dinov2_vits14": _dinov2("small", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"),
    "dinov2_vitb14": _dinov2("base", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"),
    "dinov2_vitl14": _dinov2("large", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"),
    "dinov2_vits14_reg": _dinov2_reg("small"),
    "dinov2_vitb14_reg": _dinov2_reg("base"),
    "dinov2_vitl14_reg": _dinov2_reg("large"),
    "dinov3_vits16": _dinov3("vits16", "vit_small_patch16"),
    "dinov3_vits16plus": _dinov3("vits16plus", "vit_small_plus_patch16"),
    "dinov3_vitb16": _dinov3("vitb16", "vit_base_patch16"),
    "dinov3_vitl16": _dinov3("vitl16", "vit_large_patch16"),
    "eupe_vitt16": Source(
        "Meta's EUPE", "FAIR Noncommercial Research License", page="https://github.com/facebookresearch/EUPE"
    ),
    "clip_vitb16": _clip("base", 16, "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "clip_vitb32": _clip("base", 32, "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "clip_vitl14": _clip("large", 14, "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "clip_vitl14_336": _clip("large", 14, "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", 336),
    "siglip2_vitb16": Source(
        *("Google's SigLIP 2", "Apache-2.0", None, None, "google/siglip2-base-patch16-224"),
        "timm/vit_base_patch16_siglip_224.v2_webli",
    ),
    "pe_core_t16": _pe("T16", "384"),
    "pe_core_s16": _pe("S16", "384"),
    "pe_core_b16": _pe("B16", "224"),
    "lvface_t": _lvface("T"),
    "lvface_s": _lvface("S"),
    "lvface_b": _lvface("B", "143ded01bf5794aafff91fcd1e3f3408bfbf6b890fc8482274f1c97a82fa7542"),
    "lvface_l": _lvface("L"),
    "adaface_vit_s": _adaface("small"),
    "adaface_vit_b": _adaface("base", "5fafd6b7d599a3ede5fac5bd1d01ad05e9e93e89b39b7687d4a3bc93ff2aebc0"),
    "vit_tiny_patch16": Source(
        "timm's vit_tiny_patch16_224 (AugReg)", "Apache-2.0", timm="timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    ),
}


def how_to_get(name: str) -> str:
    """The command that gives a user the file of a backbone, with where its original is if that is not downloaded."""
    source = SOURCES.get(name)
    if source is None:
        return f"{name} ships with the package: there is nothing to fetch; install vitface again if it is missing"
    if source.url is not None:
        return f"get them with\n  {command('fetch', name)}"
    page = source.page or f"https://huggingface.co/{source.transformers or source.timm}"
    return (
        f"no original of {name} is pinned; convert a file of {source.origin} that you have, from {page} "
        f"(licence: {source.licence}); its sha256 will be shown:\n"
        f"  {command('convert', name, '--src', 'FILE', '--out', cache_home() / f'{name}.safetensors')}"
    )
