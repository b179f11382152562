"""Inference: crops -> embeddings, domain weights, attention; and a faster model that computes the same function.

Letters: B images, S input side, P patch, N tokens, D width, E embedding, K domains; a crop is 112 pixels wide.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import vitface.kernels.fused as fused
import vitface.kernels.lora_linear as lora_linear
import vitface.kernels.onednn as onednn
from vitface.data.images import CROP_SIZE
from vitface.data.preprocess import resize, to_float
from vitface.device import to_device
from vitface.model.face import FaceModel
from vitface.model.lora import Linear, Mix, merge_lora
from vitface.model.pool import TokensPool
from vitface.model.vit import Block, LayerScale

CPU_BATCH = 16  # rows whose activations stay in the caches: ViT-S at 224 px embeds 1.3x as many as in batches of 128
GPU_BATCH = 128
Crops = np.ndarray | Tensor  # uint8 (B, 112, 112, 3)


@torch.no_grad()
def embed_crops(model: FaceModel, crops: Crops, flip: bool = True, unit: bool = True) -> tuple[Tensor, Tensor | None]:
    """Crops, uint8 (B, 112, 112, 3) -> (embeddings float32 (B, E), unit norm; the router's weights (B, K), rows sum to
    one, None for plain LoRA), in one pass on the model's device.

    `flip` adds the embedding of the mirror image before normalising, as the field's protocol does; the weights are
    those of the image itself. Without `unit`, embeddings keep their norm. RuntimeError in train mode, ValueError for
    other shapes.
    """
    pixels = _pixels(model, crops)
    if pixels.shape[0] == 0:  # no len(): an export must not take the number of images for a constant
        rows = torch.zeros(0, model.config.embedding_dim, device=pixels.device)
        return rows, None if model.router is None else rows.new_zeros(0, model.config.num_domains)
    if flip:
        pixels = rearrange([pixels, pixels.flip(2)], "mirrored b h w c -> (b mirrored) h w c")
    embeddings, weights, _ = model.embed_tokens(model.tokens(pixels))
    if flip:
        embeddings = embeddings[::2] + embeddings[1::2]
        weights = None if weights is None else weights[::2]
    return F.normalize(embeddings, dim=1) if unit else embeddings, weights


def embed_batches(
    model: FaceModel, batches: Iterable[Crops], flip: bool = True, unit: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """`embed_crops` of one batch after the other: embeddings (N, E) and weights (N, K), ones (N, 1) for plain LoRA.

    A GPU is waited for when the batch after is queued, so that it has work all the time.
    """
    rows = [(torch.zeros(0, model.config.embedding_dim), torch.zeros(0, model.config.num_domains))]
    for batch in batches:
        embeddings, weights = embed_crops(model, batch, flip, unit)
        rows.append((embeddings, embeddings.new_ones(len(batch), 1) if weights is None else weights))
        rows[-2] = (rows[-2][0].cpu(), rows[-2][1].cpu())
    embeddings, gates = (torch.cat([part.cpu() for part in parts]).numpy() for parts in zip(*rows, strict=True))
    return embeddings, gates


def split(model: FaceModel, images: Any, flip: bool = False, batch_size: int | None = None) -> Iterator[Any]:
    """An iterable or array in batches of `batch_size`; by default as many as suit the model's device, half with
    `flip`."""
    usual = CPU_BATCH if model.vit.device.type == "cpu" else GPU_BATCH
    batch_size = batch_size or (usual // 2 if flip else usual)
    if isinstance(images, np.ndarray | Tensor):
        for start in range(0, len(images), batch_size):
            yield images[start : start + batch_size]
        return
    remaining = iter(images)
    while batch := list(itertools.islice(remaining, batch_size)):
        yield batch


@torch.no_grad()
def route_crops(model: FaceModel, crops: Crops) -> Tensor:
    """Crops as for `embed_crops` -> domain weights (B, K), without embedding them; ones (B, 1) for plain LoRA."""
    pixels = _pixels(model, crops)
    weights = model.route(model.tokens(pixels))[0] if len(pixels) else None
    return torch.ones(len(pixels), model.config.num_domains, device=pixels.device) if weights is None else weights


@torch.no_grad()
def attend_crops(model: FaceModel, crops: Crops, block: int = -1) -> Tensor:
    """Crops as for `embed_crops` -> where CLS looks in one block of the adapted model, (B, nh, g, g) of patches.

    Without a CLS token it is where the patches look on average.
    """
    inputs = model.preprocess(to_float(_pixels(model, crops)))
    weights, _ = model.route(model.vit.tokens(inputs))
    maps, config = model.vit.attention(inputs, Mix(weights), block), model.config.vit
    rows = maps[:, :, 0] if config.class_token else maps.mean(dim=2)
    return rearrange(rows[:, :, config.prefix :], "b nh (h w) -> b nh h w", h=config.grid(inputs.shape[-1]))


def _pixels(model: FaceModel, crops: Crops) -> Tensor:
    """The crops on the model's device; checks that they are crops and that the model is in eval mode."""
    if model.training:
        raise RuntimeError("call model.eval() first: batch norm would mix the images of a batch")
    if crops.shape[1:] != (CROP_SIZE, CROP_SIZE, 3):
        raise ValueError(f"images must be uint8 (B, 112, 112, 3), not {tuple(crops.shape)}")
    crops = crops if isinstance(crops, Tensor) else torch.from_numpy(np.require(crops, requirements=["C", "W"]))
    device = model.vit.device
    return to_device(crops, device) if crops.device.type == "cpu" else crops.to(device)


@torch.no_grad()
def prepare_inference(model: FaceModel) -> FaceModel:
    """Makes the model faster and returns it; from now on it can embed and route, but not be trained or saved.

    LoRA is merged (DA-LoRA's adapters depend on the image and stay), LayerScale and a pool's batch norms go into the
    layers before them, residuals are added inside the products, the stem becomes one convolution of the crop, and on
    the CPU each weight is laid out once as oneDNN reads it. Weights are combined in float64 and rounded once, those of
    a layer to the dtype of its frozen weight: DA-LoRA's adapters too, which are cast to it where they are used.
    """
    model.eval().requires_grad_(False)
    model.use_ops(fused)  # the formulas cannot read a weight in the layout of oneDNN
    linears = {module: module.weight.dtype for module in model.vit.modules() if isinstance(module, Linear)}
    for layer in linears:
        layer.double()
    if model.config.lora_rank and model.config.num_domains == 1:
        merge_lora(model.vit)
    for number, block in enumerate(model.vit.blocks):
        assert isinstance(block, Block)
        _fold_layer_scale(block.ls1, block.attn.proj)
        _fold_layer_scale(block.ls2, block.mlp.fc2)
        model.vit.blocks[number] = PreparedBlock(block)
    if isinstance(model.vit.pool, TokensPool):
        model.vit.pool = _fold_batch_norms(model.vit.pool)
    for layer, dtype in linears.items():
        layer.to(dtype)
        layer.weight = nn.Parameter(onednn.pack(layer.weight), requires_grad=False)
    model.use_stem(fold_stem(model))
    return model


def _fold_layer_scale(scale: nn.Module, layer: Linear) -> None:
    """γ ⊙ (x Wᵀ + b + s (xa ⊙ gate) Bᵀ) is the same layer with γ in the rows of W, b and B."""
    if isinstance(scale, LayerScale):
        gamma = scale.gamma.double()
        for parameter in (layer.weight, layer.lora_b):
            if parameter is not None:
                parameter.mul_(gamma[:, None])
        layer.bias.mul_(gamma)


def _fold_batch_norms(pool: TokensPool) -> nn.Module:
    """A pool's two maps, each with its batch norm as the scale of its rows and a bias."""
    for layer, norm in ((pool.fc1, pool.norm1), (pool.fc2, pool.norm2)):
        norm.double()
        layer.bias = nn.Parameter(norm(torch.zeros_like(norm.bias)), requires_grad=False)
        layer.weight.mul_((norm.weight * torch.rsqrt(norm.running_var + norm.eps))[:, None])
    return FoldedPool(pool)


class FoldedPool(nn.Module):
    """`TokensPool` whose batch norms are in its two maps."""

    def __init__(self, pool: TokensPool):
        super().__init__()
        self.fc1, self.fc2 = pool.fc1, pool.fc2

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.fc1(tokens.flatten(1).to(self.fc1.weight.dtype)))


class PreparedBlock(Block):
    """A block without LayerScale and gradients: the products add the residuals and apply the activation."""

    def __init__(self, block: Block):
        nn.Module.__init__(self)
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp

    def forward(self, x: Tensor, mix: Mix | None = None, rotation: Tensor | None = None) -> Tensor:
        attn, mlp = self.attn, self.mlp
        x = _add(x[:, : attn.num_queries], attn.proj, attn.heads(self.norm1(x), mix, rotation), mix)
        h, fc1 = self.norm2(x), mlp.fc1
        if mix is None or not fc1.has_lora:
            h = onednn.activated_product(h, fc1.weight, fc1.bias, mlp.act)
        else:
            h = mlp.ops.activate(fc1(h, mix), mlp.act)
        return _add(x, mlp.fc2, h, mix)


def _add(x: Tensor, layer: Linear, h: Tensor, mix: Mix | None) -> Tensor:
    """x + layer(h, mix), (B, N, D)."""
    a, b = layer.lora_a, layer.lora_b
    if mix is None or a is None or b is None:
        return onednn.product(h, layer.weight, layer.bias, x)
    rows, residual = h.flatten(0, 1), x.flatten(0, 1)
    y, _ = lora_linear.forward(rows, layer.weight, layer.bias, a, b, layer.scaling, mix.gate, residual)
    return y.view(x.shape)


class FoldedStem(nn.Module):
    """Crops, uint8 (B, 112, 112, 3) -> patch embeddings (B, g², D), in one convolution.

    Division by 255, resizing, normalising and the patch convolution are all linear in the pixels, and a patch is a
    whole number of the crop's pixels wide, so each patch sees the crop through the same kernel: `stride` pixels and as
    far around as the resizing rule reaches. Beyond the border the resizing repeats the outermost pixel.
    """

    def __init__(self, kernel: Tensor, bias: Tensor, stride: int):
        super().__init__()
        self.kernel, self.bias = nn.Parameter(kernel, False), nn.Parameter(bias, False)
        self.stride, self.reach = stride, (kernel.shape[-1] - stride) // 2

    def forward(self, crops: Tensor) -> Tensor:
        pixels = rearrange(crops, "b h w c -> b c h w").to(self.kernel.dtype)  # whole numbers to 255, exact in bf16
        pixels = F.pad(pixels, [self.reach] * 4, mode="replicate")
        return rearrange(F.conv2d(pixels, self.kernel, self.bias, self.stride), "b d h w -> b (h w) d")


@torch.no_grad()
def fold_stem(model: FaceModel) -> FoldedStem | None:
    """The stem of `model`; None where a patch is not a whole number of the crop's pixels wide, as at 518 px."""
    patch, side = model.config.vit.patch_size, model.config.image_size
    stride, rest = divmod(patch * CROP_SIZE, side)
    if rest:
        return None
    reach = 0 if side == CROP_SIZE else {"bilinear": 1, "bicubic": 2}[model.config.resize]
    # how much each of the crop's pixels in reach adds to each of a patch's, along one axis; the patch sees no border
    lit = torch.eye(5 * stride, dtype=torch.float64)[:, None, :, None].expand(-1, 1, -1, 5 * stride)
    spread = resize(lit, 5 * patch, model.config.resize)[2 * stride - reach : 3 * stride + reach, 0, :, 0]
    spread = spread[:, 2 * patch : 3 * patch]
    config, proj = model.config.vit, copy.deepcopy(model.vit.patch_embed.proj).double().cpu()
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (config.mean, config.std))
    kernel = torch.einsum("dcpq,yp,xq->dcyx", proj.weight / (255 * std), spread, spread)
    bias = proj(-(mean / std).expand(1, 3, patch, patch)).flatten()
    like = model.vit.patch_embed.proj.weight
    return FoldedStem(kernel.to(like), bias.to(like), stride)
