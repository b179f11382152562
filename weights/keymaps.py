"""The names of other people's checkpoints, one literal map per family of files, in our names.

`{i}` is the block's index, `.*` stands for `.weight` and `.bias`. `[q]`, `[k]` and `[v]` mark the parts of a fused
`attn.qkv`, which is stacked by these marks, never by the order in a file. What is not used is listed, in two places:
`dropped` (patterns inside the vision tower) and `beside` (patterns of names without the tower's prefix).
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase


def _abstract(name: str) -> tuple[str, str]:
    """("blocks.{i}.norm1.weight", "3") for "blocks.3.norm1.weight"; the index is "" where there is none."""
    index = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (name, "") if index is None else (f"{name[: index.start()]}{{i}}{name[index.end() :]}", index[0])


@dataclass(frozen=True)
class Family:
    """One layout of a source file, told by what it calls the CLS token; `prefixes` may precede the tower's names.

    `registers` are the names under which a variant carries register tokens, which our ViT has not.
    """

    title: str
    cls_token: str
    keys: dict[str, str]
    prefixes: tuple[str, ...] = ("",)
    dropped: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    registers: tuple[str, ...] = ()

    def target(self, key: str) -> str | None:
        """Our name (with its [q], [k] or [v]) for `key`, which has no prefix any more; None if the map has none."""
        abstract, index = _abstract(key)
        target = self.keys.get(abstract)
        return None if target is None else target.replace("{i}", index)

    def source_names(self, target: str) -> list[str]:
        """The names, without prefix, that give `target`, which is one of ours with its [q], [k] or [v]."""
        abstract, index = _abstract(target)
        return [key.replace("{i}", index) for key, value in self.keys.items() if value == abstract]

    def dropped_by(self, key: str, inside: bool) -> str | None:
        """The pattern that lists `key` as not used, or None. `inside`: it had the tower's prefix, removed by now."""
        return next((p for p in (self.dropped if inside else self.beside) if fnmatchcase(key, p)), None)


def _weights_and_biases(keys: dict[str, str]) -> dict[str, str]:
    expanded = {}
    for key, target in keys.items():
        for kind in ("weight", "bias") if ".*" in key else ("",):
            expanded[key.replace("*", kind)] = target.replace("*", kind)
    return expanded


# Meta's DINOv2 and everything of timm's, CLIP included: the names are ours.
META_TIMM = Family(
    title="Meta or timm",
    cls_token="cls_token",
    keys=_weights_and_biases(
        {
            "cls_token": "cls_token",
            "pos_embed": "pos_embed",
            "patch_embed.proj.*": "patch_embed.proj.*",
            "norm_pre.*": "norm_pre.*",
            "blocks.{i}.norm1.*": "blocks.{i}.norm1.*",
            "blocks.{i}.attn.qkv.*": "blocks.{i}.attn.qkv.*",
            "blocks.{i}.attn.proj.*": "blocks.{i}.attn.proj.*",
            "blocks.{i}.ls1.gamma": "blocks.{i}.ls1.gamma",
            "blocks.{i}.norm2.*": "blocks.{i}.norm2.*",
            "blocks.{i}.mlp.fc1.*": "blocks.{i}.mlp.fc1.*",
            "blocks.{i}.mlp.fc2.*": "blocks.{i}.mlp.fc2.*",
            "blocks.{i}.ls2.gamma": "blocks.{i}.ls2.gamma",
            "norm.*": "norm.*",
        }
    ),
    dropped=("mask_token", "head.weight", "head.bias"),
    registers=("register_tokens", "reg_token"),
)

# transformers' Dinov2Model. Since version 5 its modules have the second attention names; its files keep the first.
TRANSFORMERS_DINOV2 = Family(
    title="transformers DINOv2",
    cls_token="embeddings.cls_token",
    keys=_weights_and_biases(
        {
            "embeddings.cls_token": "cls_token",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.patch_embeddings.projection.*": "patch_embed.proj.*",
            "encoder.layer.{i}.norm1.*": "blocks.{i}.norm1.*",
            "encoder.layer.{i}.attention.attention.query.*": "blocks.{i}.attn.qkv.*[q]",
            "encoder.layer.{i}.attention.attention.key.*": "blocks.{i}.attn.qkv.*[k]",
            "encoder.layer.{i}.attention.attention.value.*": "blocks.{i}.attn.qkv.*[v]",
            "encoder.layer.{i}.attention.output.dense.*": "blocks.{i}.attn.proj.*",
            "encoder.layer.{i}.attention.q_proj.*": "blocks.{i}.attn.qkv.*[q]",
            "encoder.layer.{i}.attention.k_proj.*": "blocks.{i}.attn.qkv.*[k]",
            "encoder.layer.{i}.attention.v_proj.*": "blocks.{i}.attn.qkv.*[v]",
            "encoder.layer.{i}.attention.o_proj.*": "blocks.{i}.attn.proj.*",
            "encoder.layer.{i}.layer_scale1.lambda1": "blocks.{i}.ls1.gamma",
            "encoder.layer.{i}.norm2.*": "blocks.{i}.norm2.*",
            "encoder.layer.{i}.mlp.fc1.*": "blocks.{i}.mlp.fc1.*",
            "encoder.layer.{i}.mlp.fc2.*": "blocks.{i}.mlp.fc2.*",
            "encoder.layer.{i}.layer_scale2.lambda1": "blocks.{i}.ls2.gamma",
            "layernorm.*": "norm.*",
        }
    ),
    prefixes=("", "dinov2."),
    dropped=("embeddings.mask_token",),
    beside=("classifier.weight", "classifier.bias"),
    registers=("embeddings.register_tokens",),
)

# transformers' ViTModel. Since version 5 its modules have the second names of the blocks; its files keep the first.
TRANSFORMERS_VIT = Family(
    title="transformers ViT",
    cls_token="embeddings.cls_token",
    keys=_weights_and_biases(
        {
            "embeddings.cls_token": "cls_token",
            "embeddings.position_embeddings": "pos_embed",
            "embeddings.patch_embeddings.projection.*": "patch_embed.proj.*",
            "encoder.layer.{i}.layernorm_before.*": "blocks.{i}.norm1.*",
            "encoder.layer.{i}.attention.attention.query.*": "blocks.{i}.attn.qkv.*[q]",
            "encoder.layer.{i}.attention.attention.key.*": "blocks.{i}.attn.qkv.*[k]",
            "encoder.layer.{i}.attention.attention.value.*": "blocks.{i}.attn.qkv.*[v]",
            "encoder.layer.{i}.attention.output.dense.*": "blocks.{i}.attn.proj.*",
            "encoder.layer.{i}.layernorm_after.*": "blocks.{i}.norm2.*",
            "encoder.layer.{i}.intermediate.dense.*": "blocks.{i}.mlp.fc1.*",
            "encoder.layer.{i}.output.dense.*": "blocks.{i}.mlp.fc2.*",
            "layers.{i}.layernorm_before.*": "blocks.{i}.norm1.*",
            "layers.{i}.attention.q_proj.*": "blocks.{i}.attn.qkv.*[q]",
            "layers.{i}.attention.k_proj.*": "blocks.{i}.attn.qkv.*[k]",
            "layers.{i}.attention.v_proj.*": "blocks.{i}.attn.qkv.*[v]",
            "layers.{i}.attention.o_proj.*": "blocks.{i}.attn.proj.*",
            "layers.{i}.layernorm_after.*": "blocks.{i}.norm2.*",
            "layers.{i}.mlp.fc1.*": "blocks.{i}.mlp.fc1.*",
            "layers.{i}.mlp.fc2.*": "blocks.{i}.mlp.fc2.*",
            "layernorm.*": "norm.*",
        }
    ),
    prefixes=("", "vit."),
    dropped=("embeddings.mask_token", "pooler.dense.weight", "pooler.dense.bias"),
    beside=("classifier.weight", "classifier.bias"),
)

# transformers' CLIPVisionModel (no prefix since version 5), CLIPVisionModelWithProjection and the whole CLIPModel.
TRANSFORMERS_CLIP = Family(
    title="transformers CLIP",
    cls_token="embeddings.class_embedding",
    keys=_weights_and_biases(
        {
            "embeddings.class_embedding": "cls_token",
            "embeddings.position_embedding.weight": "pos_embed",
            "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
            "pre_layrnorm.*": "norm_pre.*",  # spelt so in their files
            "encoder.layers.{i}.layer_norm1.*": "blocks.{i}.norm1.*",
            "encoder.layers.{i}.self_attn.q_proj.*": "blocks.{i}.attn.qkv.*[q]",
            "encoder.layers.{i}.self_attn.k_proj.*": "blocks.{i}.attn.qkv.*[k]",
            "encoder.layers.{i}.self_attn.v_proj.*": "blocks.{i}.attn.qkv.*[v]",
            "encoder.layers.{i}.self_attn.out_proj.*": "blocks.{i}.attn.proj.*",
            "encoder.layers.{i}.layer_norm2.*": "blocks.{i}.norm2.*",
            "encoder.layers.{i}.mlp.fc1.*": "blocks.{i}.mlp.fc1.*",
            "encoder.layers.{i}.mlp.fc2.*": "blocks.{i}.mlp.fc2.*",
            "post_layernorm.*": "norm.*",
        }
    ),
    prefixes=("", "vision_model.", "vision_model.vision_model."),
    dropped=("embeddings.position_ids",),
    beside=("visual_projection.weight", "text_model.*", "text_projection.weight", "logit_scale"),
)

# OpenAI's archive and open_clip's own files; `proj` is what turns the tower's output into the shared embedding.
OPENAI_CLIP = Family(
    title="OpenAI or open_clip",
    cls_token="class_embedding",
    keys=_weights_and_biases(
        {
            "class_embedding": "cls_token",
            "positional_embedding": "pos_embed",
            "conv1.weight": "patch_embed.proj.weight",
            "ln_pre.*": "norm_pre.*",
            "transformer.resblocks.{i}.ln_1.*": "blocks.{i}.norm1.*",
            "transformer.resblocks.{i}.attn.in_proj_weight": "blocks.{i}.attn.qkv.weight",
            "transformer.resblocks.{i}.attn.in_proj_bias": "blocks.{i}.attn.qkv.bias",
            "transformer.resblocks.{i}.attn.out_proj.*": "blocks.{i}.attn.proj.*",
            "transformer.resblocks.{i}.ln_2.*": "blocks.{i}.norm2.*",
            "transformer.resblocks.{i}.mlp.c_fc.*": "blocks.{i}.mlp.fc1.*",
            "transformer.resblocks.{i}.mlp.c_proj.*": "blocks.{i}.mlp.fc2.*",
            "ln_post.*": "norm.*",
        }
    ),
    prefixes=("visual.", ""),
    dropped=("proj",),
    beside=(
        "positional_embedding", "text_projection", "token_embedding.weight", "transformer.resblocks.*",
        "ln_final.weight", "ln_final.bias", "logit_scale", "input_resolution", "context_length", "vocab_size",
    ),
)  # fmt: skip

FAMILIES = (META_TIMM, TRANSFORMERS_DINOV2, TRANSFORMERS_VIT, TRANSFORMERS_CLIP, OPENAI_CLIP)


def find_family(names: set[str]) -> tuple[Family, str] | None:
    """The family of a file that holds `names`, and the prefix of its vision tower; None for any other file.

    transformers' DINOv2 and ViT share the CLS token's name: of several families the one that knows more of the names.
    """

    def known(match: tuple[Family, str]) -> int:
        return sum(match[0].target(name.removeprefix(match[1])) is not None for name in names)

    matches = [
        (family, prefix) for family in FAMILIES for prefix in family.prefixes if prefix + family.cls_token in names
    ]
    return max(matches, key=known, default=None)


def transformers_family(backbone: str) -> Family:
    """The layout of the transformers model that is the preset `backbone`."""
    kinds = {"dinov2": TRANSFORMERS_DINOV2, "clip": TRANSFORMERS_CLIP, "vit": TRANSFORMERS_VIT}
    return kinds[backbone.split("_")[0]]
