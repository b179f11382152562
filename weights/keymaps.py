"""The names in published checkpoints, with a map to ours for each family of files.

`{i}` is the block's index, `*` stands for `weight` and `bias`. `[q]`, `[k]` and `[v]` mark the parts of a fused
`attn.qkv`, `[gate]` and `[up]` those of SwiGLU's `mlp.fc1`, which are stacked by these marks, never by their order in a
file. Names are those that `weights.layouts.arrange` leaves. Tensors that are not used are listed:
`dropped` has patterns of names in the vision tower, `outside` of names without the tower's prefix.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

# of the parts of a fused qkv, of SwiGLU's fc1, and of a whole layer
MARKS = (("[q]", "[k]", "[v]"), ("[gate]", "[up]"), ("",))


def _abstract(name: str) -> tuple[str, str]:
    """("blocks.{i}.norm1.weight", "3") for "blocks.3.norm1.weight"; the index is "" where there is none."""
    index = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name, "") if index is None else (f"{name[: index.start()]}{{i}}{name[index.end() :]}", index[0])


@dataclass(frozen=True)
class Family:
    """One layout of source files: `names` maps its names to ours; `prefixes` may precede the vision tower's names."""

    title: str
    names: dict[str, str]
    prefixes: tuple[str, ...] = ("",)
    dropped: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()

    @cached_property
    def keys(self) -> dict[str, str]:
        """`names` with the weights and biases spelled out."""
        kinds = {name: ("weight", "bias") if "*" in name else ("",) for name in self.names}
        return {name.replace("*", kind): self.names[name].replace("*", kind) for name in kinds for kind in kinds[name]}

    def target(self, key: str) -> str | None:
        """Our name, with its [q], [k] or [v], for `key` without prefix; None if the map has none."""
        abstract, index = _abstract(key)
        target = self.keys.get(key, self.keys.get(abstract))
        return None if target is None else target.replace("{i}", index)

    def targets(self, keys: Iterable[str], prefix: str) -> dict[str, str]:
        """{key: `target` of it} for the keys with this prefix that the map has."""
        found = {key: self.target(key.removeprefix(prefix)) for key in keys if key.startswith(prefix)}
        return {key: target for key, target in found.items() if target is not None}

    def source_names(self, target: str) -> list[str]:
        """The names, without prefix, that map to `target`, one of ours with its [q], [k] or [v]."""
        abstract, index = _abstract(target)
        return [key.replace("{i}", index) for key, value in self.keys.items() if value == abstract]


def _block(prefix: str, norm1: str, attention: tuple[str, ...], norm2: str, fc1: str, fc2: str) -> dict[str, str]:
    """The names of a block's layers; `attention` is (q, k, v, projection) or (fused qkv, projection)."""
    fused = ("attn.qkv.*",) if len(attention) == 2 else ("attn.qkv.*[q]", "attn.qkv.*[k]", "attn.qkv.*[v]")
    ours = ("norm1.*", *fused, "attn.proj.*", "norm2.*", "mlp.fc1.*", "mlp.fc2.*")
    theirs = (norm1, *attention, norm2, fc1, fc2)
    stars = [name if "*" in name else f"{name}.*" for name in theirs]
    return {f"{prefix}.{{i}}.{name}": f"blocks.{{i}}.{our}" for name, our in zip(stars, ours, strict=True)}


def _pool(prefix: str, query: str, proj: str, norm: str, fc1: str, fc2: str) -> dict[str, str]:
    """The names of an attention pool, whose fused projection `arrange` has parted into q and kv."""
    theirs = (query, "q.*", "kv.*", f"{proj}.*", f"{norm}.*", f"{fc1}.*", f"{fc2}.*")
    ours = ("query", "q.*", "kv.*", "proj.*", "norm.*", "fc1.*", "fc2.*")
    return {f"{prefix}.{name}": f"pool.{our}" for name, our in zip(theirs, ours, strict=True)}


# Meta's DINOv2 and DINOv3, and everything of timm's, CLIP included: the names are ours, but for a few.
META_TIMM = Family(
    title="Meta or timm",
    names={
        "cls_token": "cls_token",
        "pos_embed": "pos_embed",
        "patch_embed.proj.*": "patch_embed.proj.*",
        "norm_pre.*": "norm_pre.*",
        **_block("blocks", "norm1", ("attn.qkv", "attn.proj"), "norm2", "mlp.fc1", "mlp.fc2"),
        "blocks.{i}.ls1.gamma": "blocks.{i}.ls1.gamma",
        "blocks.{i}.ls2.gamma": "blocks.{i}.ls2.gamma",
        "blocks.{i}.gamma_1": "blocks.{i}.ls1.gamma",
        "blocks.{i}.gamma_2": "blocks.{i}.ls2.gamma",
        **dict.fromkeys(("register_tokens", "storage_tokens", "reg_token"), "register_tokens"),
        "blocks.{i}.mlp.fc1_g.*": "blocks.{i}.mlp.fc1.*[gate]",
        "blocks.{i}.mlp.fc1_x.*": "blocks.{i}.mlp.fc1.*[up]",
        **_pool("attn_pool", "latent", "proj", "norm", "mlp.fc1", "mlp.fc2"),
        "norm.*": "norm.*",
    },
    dropped=("mask_token", "head.weight", "head.bias", "rope_embed.periods", "projectors.*"),
)

# transformers' Dinov2Model and ViTModel. Since version 5 their modules have the second names, their files the first.
_VERSION_4 = tuple(
    f"attention.{name}" for name in ("attention.query", "attention.key", "attention.value", "output.dense")
)
_VERSION_5 = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_EMBEDDINGS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.*": "patch_embed.proj.*",
    "layernorm.*": "norm.*",
}
TRANSFORMERS_DINOV2 = Family(
    title="transformers DINOv2",
    names={
        **_EMBEDDINGS,
        **_block("encoder.layer", "norm1", _VERSION_4, "norm2", "mlp.fc1", "mlp.fc2"),
        **_block("encoder.layer", "norm1", _VERSION_5, "norm2", "mlp.fc1", "mlp.fc2"),
        "embeddings.register_tokens": "register_tokens",
        "encoder.layer.{i}.layer_scale1.lambda1": "blocks.{i}.ls1.gamma",
        "encoder.layer.{i}.layer_scale2.lambda1": "blocks.{i}.ls2.gamma",
    },
    prefixes=("", "dinov2."),
    dropped=("embeddings.mask_token",),
    outside=("classifier.weight", "classifier.bias"),
)


def _dinov3(title: str, mlp: dict[str, str]) -> Family:
    names = {
        "embeddings.cls_token": "cls_token",
        "embeddings.register_tokens": "register_tokens",
        "embeddings.patch_embeddings.*": "patch_embed.proj.*",
        "norm.*": "norm.*",
    }
    for layer in ("layer", "model.layer"):  # their files, and their modules since version 5
        names |= _block(layer, "norm1", _VERSION_5, "norm2", "mlp.up_proj", "mlp.down_proj")
        names |= {f"{layer}.{{i}}.layer_scale{n}.lambda1": f"blocks.{{i}}.ls{n}.gamma" for n in (1, 2)}
        names |= {f"{layer}.{{i}}.mlp.{name}.*": f"blocks.{{i}}.mlp.{ours}" for name, ours in mlp.items()}
    beside = ("classifier.weight", "classifier.bias")
    return Family(title, names, ("", "dinov3_vit."), ("embeddings.mask_token", "rope_embeddings.*"), beside)


TRANSFORMERS_DINOV3 = _dinov3("transformers DINOv3", {})
TRANSFORMERS_DINOV3_GATED = _dinov3(
    "transformers DINOv3 with SwiGLU", {"gate_proj": "fc1.*[gate]", "up_proj": "fc1.*[up]"}
)
TRANSFORMERS_VIT = Family(
    title="transformers ViT",
    names={
        **_EMBEDDINGS,
        **_block(
            "encoder.layer", "layernorm_before", _VERSION_4, "layernorm_after", "intermediate.dense", "output.dense"
        ),
        **_block("layers", "layernorm_before", _VERSION_5, "layernorm_after", "mlp.fc1", "mlp.fc2"),
    },
    prefixes=("", "vit."),
    dropped=("embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"),
    outside=("classifier.weight", "classifier.bias"),
)

# transformers' CLIPVisionModel (no prefix since version 5), CLIPVisionModelWithProjection and the whole CLIPModel.
_CLIP_ATTENTION = tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj"))
TRANSFORMERS_CLIP = Family(
    title="transformers CLIP",
    names={
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
        "pre_layrnorm.*": "norm_pre.*",  # this is the spelling in their files
        **_block("encoder.layers", "layer_norm1", _CLIP_ATTENTION, "layer_norm2", "mlp.fc1", "mlp.fc2"),
        "post_layernorm.*": "norm.*",
    },
    prefixes=("", "vision_model.", "vision_model.vision_model."),
    dropped=("embeddings.position_ids",),
    outside=("visual_projection.weight", "text_model.*", "text_projection.weight", "logit_scale"),
)

# transformers' SiglipVisionModel and the whole SiglipModel, of SigLIP 2 as well.
TRANSFORMERS_SIGLIP = Family(
    title="transformers SigLIP",
    names={
        "embeddings.position_embedding.weight": "pos_embed",
        "embeddings.patch_embedding.*": "patch_embed.proj.*",
        **_block("encoder.layers", "layer_norm1", _CLIP_ATTENTION, "layer_norm2", "mlp.fc1", "mlp.fc2"),
        "post_layernorm.*": "norm.*",
        **_pool("head", "probe", "attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2"),
    },
    prefixes=("", "vision_model.", "vision_model.vision_model."),
    dropped=("embeddings.position_ids",),
    outside=("text_model.*", "logit_scale", "logit_bias"),
)

# big_vision's own files of SigLIP and SigLIP 2, whose kernels `arrange` has turned and whose blocks it has numbered.
_BIG_VISION_ATTENTION = tuple(f"MultiHeadDotProductAttention_0.{name}" for name in ("query", "key", "value", "out"))
_BIG_VISION_MLP = ("MlpBlock_0.Dense_0", "MlpBlock_0.Dense_1")
BIG_VISION = Family(
    title="big_vision",
    names={
        "embedding.*": "patch_embed.proj.*",
        "pos_embedding": "pos_embed",
        **_block(
            "encoderblock",
            "LayerNorm_0",
            _BIG_VISION_ATTENTION,
            "LayerNorm_1",
            "MlpBlock_0.Dense_0",
            "MlpBlock_0.Dense_1",
        ),
        "encoder_norm.*": "norm.*",
        **_pool("MAPHead_0", "probe", "out", "LayerNorm_0", *_BIG_VISION_MLP),
    },
    prefixes=("params/img/",),
    outside=("params/txt/*", "params/t", "params/b"),
)

# OpenAI's archive, open_clip's own files, and Meta's PE, which has an attention pool; `proj` turns the tower's output
# into the shared embedding.
_TEXT_TOWER = (
    *("positional_embedding", "text_projection", "token_embedding.weight", "ln_final.*", "transformer.resblocks.*"),
    *("logit_scale", "input_resolution", "context_length", "vocab_size"),
)
OPENAI_CLIP = Family(
    title="OpenAI or open_clip",
    names={
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "conv1.weight": "patch_embed.proj.weight",
        "ln_pre.*": "norm_pre.*",
        **_block(
            "transformer.resblocks", "ln_1", ("attn.in_proj_*", "attn.out_proj"), "ln_2", "mlp.c_fc", "mlp.c_proj"
        ),
        "ln_post.*": "norm.*",
        **_pool("attn_pool", "probe", "attn.out_proj", "layernorm", "mlp.c_fc", "mlp.c_proj"),
    },
    prefixes=("visual.", ""),
    dropped=("proj",),
    outside=_TEXT_TOWER,
)

# arcface_torch's ViTs, LVFace's and CVLface's, whose `feature` maps all tokens in a row to the embedding.
_NORM = ("weight", "bias", "running_mean", "running_var")
RECOGNISER = Family(
    title="LVFace, arcface_torch or CVLface",
    names={
        **{name: name for name in ("pos_embed", "patch_embed.proj.*", "norm.*")},
        **_block("blocks", "norm1", ("attn.qkv", "attn.proj"), "norm2", "mlp.fc1", "mlp.fc2"),
        **{f"feature.{2 * i}.weight": f"pool.fc{i + 1}.weight" for i in (0, 1)},
        **{f"feature.{2 * i + 1}.{kind}": f"pool.norm{i + 1}.{kind}" for i in (0, 1) for kind in _NORM},
    },
    dropped=("mask_token", "feature.[13].num_batches_tracked"),
)

FAMILIES = (
    META_TIMM,
    RECOGNISER,
    TRANSFORMERS_DINOV2,
    TRANSFORMERS_DINOV3,
    TRANSFORMERS_DINOV3_GATED,
    TRANSFORMERS_VIT,
    TRANSFORMERS_CLIP,
    TRANSFORMERS_SIGLIP,
    BIG_VISION,
    OPENAI_CLIP,
)
# what training scripts put in front of a tower's names, and the names of what they train beside it
_AROUND = {
    "module",
    "model",
    "net",
    "backbone",
    "encoder",
    "trunk",
    "timm_model",
    "visual",
    "image_encoder",
    "vision_tower",
}
_AROUND |= {"vision_model", "vit", "base_model", "teacher", "student", "ema", "model_ema"}
BESIDE = ("*head*", "student.*", "classifier.*", "fc.*", "projectors.*", "teacher.*_head.*")


def find_family(names: set[str]) -> tuple[Family, str] | None:
    """The family of a file that holds `names`, and the prefix of its vision tower; None for any other file.

    Families share names: of several, the one that knows most names counts, and a teacher before a student.
    """
    matches = []
    for family in FAMILIES:
        for end in family.source_names("patch_embed.proj.weight"):
            prefixes = {name.removesuffix(end) for name in names if name.endswith(end)}
            matches += [(family, prefix) for prefix in sorted(prefixes) if _may_precede(prefix, family)]
    return max(matches, key=lambda m: (len(m[0].targets(names, m[1])), "student" not in m[1]), default=None)


def common_prefix(names: Iterable[str]) -> str:
    """What training scripts put in front of every name of a file, such as "module."; a vision tower's own stays."""
    prefix, rest = "", [*names]
    while (first := {name.partition(".")[0] for name in rest}) and len(first) == 1 and first < _AROUND - {"visual"}:
        part = f"{first.pop()}."
        if part == "vision_model." or not all(name.startswith(part) for name in rest):
            break
        prefix, rest = prefix + part, [name.removeprefix(part) for name in rest]
    return prefix


def _may_precede(prefix: str, family: Family) -> bool:
    around = next((p for p in sorted(family.prefixes, key=len, reverse=True) if prefix.endswith(p)), "")
    outer = prefix.removesuffix(around)
    return not outer or (outer.endswith(".") and set(outer[:-1].split(".")) <= _AROUND)


def transformers_family(backbone: str) -> Family | None:
    """The layout of the transformers model that is the preset `backbone`; None if it has no such model."""
    if backbone == "dinov3_vits16plus":
        return TRANSFORMERS_DINOV3_GATED
    kinds = {"dinov2": TRANSFORMERS_DINOV2, "dinov3": TRANSFORMERS_DINOV3, "eupe": TRANSFORMERS_DINOV3}
    kinds |= {"clip": TRANSFORMERS_CLIP, "siglip2": TRANSFORMERS_SIGLIP, "vit": TRANSFORMERS_VIT}
    return kinds.get(backbone.split("_")[0])
