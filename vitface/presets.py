"""The presets: backbones, by what differs between the Vision Transformers that are known here, and experiments."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vitface.errors import ConfigError, did_you_mean

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
Act = Literal["gelu", "quick_gelu", "gelu_tanh", "relu6", "swiglu"]  # of the MLP, see `vitface.model.ops.activate`


@dataclass(frozen=True)
class ViTConfig:
    """A Vision Transformer's sizes and conventions, as they were when it was pretrained.

    `native_size` is the image side in pixels whose patch grid `pos_embed` was learned on. `mlp_ratio` is the hidden
    width of an MLP over `embed_dim`. Before the patches stand the CLS token, where there is one, and the `registers`
    (Darcet et al. 2023, arXiv:2309.16588). `pos_embed` is whether positions are learned; `pos_interp` names the rule
    that resamples them to another grid, `rope` that of rotary ones (see `vitface.model.positions`). `pool` is what the
    backbone itself makes of its tokens (see `vitface.model.pool`): the CLS token, attention of a learned query with
    `pool_heads` heads, or all tokens in a row mapped to `pool_dim` numbers. `mean` and `std` are RGB, for images in
    [0, 1].
    """

    native_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    act: Act = "gelu"
    qkv_bias: bool = True
    layer_scale: bool = False
    norm_pre: bool = False
    patch_bias: bool = True
    norm_eps: float = 1e-6
    class_token: bool = True
    registers: int = 0
    pos_embed: bool = True
    pos_interp: Literal["scale_offset", "size", "size_antialias", "size_bilinear"] = "size_antialias"
    rope: Literal["none", "unit", "index"] = "none"
    pool: Literal["cls", "attention", "tokens"] = "cls"
    pool_heads: int = 0
    pool_dim: int = 0
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches."""
        return self.class_token + self.registers

    @property
    def output_dim(self) -> int:
        """The width of what `pool` makes."""
        return self.pool_dim or self.embed_dim

    @property
    def usual_size(self) -> int:
        """The side of the images that the backbone is given unless another is asked for: 224 px, or its native size
        where that is smaller."""
        return min(self.native_size, 224)

    def grid(self, image_size: int) -> int:
        """Patches along one side of a square image of `image_size` pixels.

        ConfigError unless the patch divides it, or it is the native size: then pixels that fill no patch are not seen.
        """
        if image_size == self.native_size:
            return image_size // self.patch_size
        if self.pool == "tokens":
            raise ConfigError(f"this recogniser takes images of {self.native_size} px, not {image_size}")
        if image_size <= 0 or image_size % self.patch_size:
            below = max(image_size // self.patch_size, 1) * self.patch_size
            raise ConfigError(
                f"image size {image_size} is not a multiple of the patch size {self.patch_size}; "
                f"use {below} or {below + self.patch_size}"
            )
        return image_size // self.patch_size

    def check_head(self, head: str, levels: int, embedding_dim: int, trained: bool) -> None:
        """ConfigError unless there can be such an embedding head."""
        if levels > self.depth:
            raise ConfigError(f"--head-levels must be at most {self.depth}, the number of blocks, not {levels}")
        if levels > 1 and head != "patches":
            raise ConfigError("--head-levels goes with --head patches")
        if head == "pretrained" and embedding_dim != self.output_dim:
            raise ConfigError(f"--head pretrained gives {self.output_dim} numbers, not --embedding-dim {embedding_dim}")
        if trained and (head != "pretrained" or self.pool == "cls"):
            raise ConfigError("--train-head trains the head that a backbone brings, --head pretrained of a recogniser")

    def num_tokens(self, image_size: int) -> int:
        """Of an image: the prefix and the patches."""
        return self.prefix + self.grid(image_size) ** 2


_DINO: dict[str, Any] = dict(layer_scale=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
_DINOV2: dict[str, Any] = _DINO | dict(pos_interp="scale_offset")
_DINOV2_REG: dict[str, Any] = _DINO | dict(registers=4)
_DINOV3: dict[str, Any] = _DINO | dict(registers=4, pos_embed=False, rope="unit", norm_eps=1e-5)
_CLIP: dict[str, Any] = dict(act="quick_gelu", norm_pre=True, patch_bias=False, norm_eps=1e-5, pos_interp="size")
_CLIP |= dict(mean=CLIP_MEAN, std=CLIP_STD)
_SIGLIP2: dict[str, Any] = dict(class_token=False, act="gelu_tanh", pos_interp="size", pool="attention")
_PE: dict[str, Any] = dict(norm_pre=True, patch_bias=False, norm_eps=1e-5, pos_interp="size_bilinear", rope="index")
_PE |= dict(pool="attention", pool_heads=8)
_FACES: dict[str, Any] = dict(class_token=False, qkv_bias=False, act="relu6", norm_eps=1e-5, pool="tokens")
_FACES |= dict(pool_dim=512)
VIT_PRESETS: dict[str, ViTConfig] = {
    "dinov2_vits14": ViTConfig(518, 14, 384, 12, 6, **_DINOV2),
    "dinov2_vitb14": ViTConfig(518, 14, 768, 12, 12, **_DINOV2),
    "dinov2_vitl14": ViTConfig(518, 14, 1024, 24, 16, **_DINOV2),
    "dinov2_vits14_reg": ViTConfig(518, 14, 384, 12, 6, **_DINOV2_REG),
    "dinov2_vitb14_reg": ViTConfig(518, 14, 768, 12, 12, **_DINOV2_REG),
    "dinov2_vitl14_reg": ViTConfig(518, 14, 1024, 24, 16, **_DINOV2_REG),
    "dinov3_vits16": ViTConfig(224, 16, 384, 12, 6, **_DINOV3),
    "dinov3_vits16plus": ViTConfig(224, 16, 384, 12, 6, act="swiglu", **_DINOV3),
    "dinov3_vitb16": ViTConfig(224, 16, 768, 12, 12, **_DINOV3),
    "dinov3_vitl16": ViTConfig(224, 16, 1024, 24, 16, **_DINOV3),
    "eupe_vitt16": ViTConfig(224, 16, 192, 12, 3, **_DINOV3),
    "clip_vitb16": ViTConfig(224, 16, 768, 12, 12, **_CLIP),
    "clip_vitb32": ViTConfig(224, 32, 768, 12, 12, **_CLIP),
    "clip_vitl14": ViTConfig(224, 14, 1024, 24, 16, **_CLIP),
    "clip_vitl14_336": ViTConfig(336, 14, 1024, 24, 16, **_CLIP),
    "siglip2_vitb16": ViTConfig(224, 16, 768, 12, 12, pool_heads=12, **_SIGLIP2),
    "pe_core_t16": ViTConfig(384, 16, 192, 12, 3, **_PE),
    "pe_core_s16": ViTConfig(384, 16, 384, 12, 6, **_PE),
    "pe_core_b16": ViTConfig(224, 16, 768, 12, 12, **_PE),
    "lvface_t": ViTConfig(112, 9, 256, 12, 8, **_FACES),
    "lvface_s": ViTConfig(112, 9, 512, 12, 8, **_FACES),
    "lvface_b": ViTConfig(112, 9, 512, 24, 8, **_FACES),
    "lvface_l": ViTConfig(112, 9, 768, 24, 8, **_FACES),
    "adaface_vit_s": ViTConfig(112, 8, 512, 12, 8, mlp_ratio=5.0, **_FACES),
    "adaface_vit_b": ViTConfig(112, 8, 512, 24, 16, mlp_ratio=3.0, **_FACES),
    "vit_tiny_patch16": ViTConfig(224, 16, 192, 12, 3),
    "vit_nano": ViTConfig(112, 16, 128, 4, 4),
}
VIT_ALIASES = {"dinov2": "dinov2_vits14", "dinov3": "dinov3_vits16", "clip": "clip_vitb16"}


# of a recogniser that goes on: what it knows of people in general is lost at the rates and margins of a new head
KNOWS_FACES: dict[str, Any] = dict(lr=2e-4, identity_lr=1e-3, margin=0.1, scale=16.0, augment="flip")


def usual_settings(backbone: str, head: str | None) -> dict[str, Any]:
    """The training settings that follow from a backbone and the embedding head, None: the usual one."""
    vit = VIT_PRESETS[backbone_name(backbone)]
    head = head or ("pretrained" if vit.pool == "tokens" else None)
    own = {"head": head, "embedding_dim": vit.output_dim} if head == "pretrained" else {}
    return {
        "image_size": vit.usual_size,
        **own,
        **(KNOWS_FACES if head == "pretrained" and vit.pool == "tokens" else {}),
    }


def backbone_name(name: str) -> str:
    """The preset that `name` (a preset or an alias such as "dinov2") means; ConfigError lists the known ones."""
    name = VIT_ALIASES.get(name, name)
    if name not in VIT_PRESETS:
        known = [*VIT_ALIASES, *VIT_PRESETS]
        raise ConfigError(f"unknown backbone {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}")
    return name


class Experiment(NamedTuple):
    """A preset: what it is, what to expect of it and in what time; and the settings that differ from the defaults."""

    text: str
    settings: dict[str, Any]


_RECORDED: dict[str, Any] = dict(lora_alpha=16.0, head="linear", lr=1e-4, identity_lr=1e-4, batch_size=128, epochs=40)
EXPERIMENTS = {
    "demo": Experiment(
        "DA-LoRA on procedural faces, no download: 95 % on new people (frozen 76 %); 45 s, two cores",
        dict(backbone="vit_nano", image_size=112, train_data="synthetic", val_data=None, num_workers=0)
        | dict(use_dalora=True, router_depth=2, head="bn", embedding_dim=128)
        | dict(margin=0.2, scale=32.0, augment="flip", epochs=3, lr=2e-3, identity_lr=1e-2),
    ),
    "lfw_vit_tiny": Experiment(
        "LoRA on ViT-Ti/16; with 289 people as --train-data 92.9 % on LFW (frozen 76 %); 20 min, one core",
        dict(backbone="vit_tiny_patch16", image_size=160, head_levels=3, lora_targets="attn+mlp")
        | dict(lr=1e-3, scale=32.0, holdout_people=0, epochs=14),
    ),
    "exp_001": Experiment(
        "LoRA on DINOv2, CASIA-WebFace: 90.45 % on LFW recorded; 5 to 10 hours on a T4 (predicted)", _RECORDED
    ),
    "exp_002": Experiment("LoRA on CLIP, CASIA-WebFace: no result is known", _RECORDED | dict(backbone="clip")),
    "exp_003": Experiment("exp_001 with DA-LoRA: 89.50 % on LFW recorded", _RECORDED | dict(use_dalora=True)),
    "exp_004": Experiment(
        "exp_002 with DA-LoRA: no result is known", _RECORDED | dict(backbone="clip", use_dalora=True)
    ),
}
