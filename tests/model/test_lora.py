import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import optional, randomise_adapters, tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitface.kernels import fused
from vitface.model import ops
from vitface.model.lora import TARGETS, Linear, Mix, adapter_state_dict, add_lora, lora_scaling, merge_lora
from vitface.model.ops import attention, attention_map, lora_linear, split_heads, use_ops
from vitface.model.vit import ViT, init_weights

shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 4),
        "tokens": st.integers(1, 5),
        "inputs": st.integers(1, 9),
        "outputs": st.integers(1, 9),
        "rank": st.integers(1, 5),
        "domains": st.integers(1, 4),
        "seed": st.integers(0, 1000),
    }
)


def draw(shape, dtype=torch.float64):
    """x, weight, bias, a, b, gate with random values."""
    generator = torch.Generator().manual_seed(shape["seed"])
    b, n, i, o, r, k = (shape[key] for key in ("batch", "tokens", "inputs", "outputs", "rank", "domains"))
    sizes = [(b, n, i), (o, i), (o,), (k * r, i), (o, k * r), (b, k)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


@given(shapes)
def test_equals_the_sum_over_domains_of_the_definition(shape):
    x, weight, bias, a, b, gate = draw(shape)
    rank, expected = shape["rank"], []
    for image in range(len(x)):  # W' = W + scaling * sum_k w_k B_k A_k, image by image
        merged = weight.clone()
        for k in range(shape["domains"]):
            part = slice(k * rank, (k + 1) * rank)
            merged += 1.7 * gate[image, k] * b[:, part] @ a[part]
        expected.append(x[image] @ merged.T + bias)
    torch.testing.assert_close(lora_linear(x, weight, bias, a, b, 1.7, gate), torch.stack(expected), rtol=0, atol=1e-11)


@given(shapes)
def test_linear_in_the_gate(shape):
    x, weight, bias, a, b, gate = draw(shape)
    other = gate.flip(0) * 0.3 + 1

    def delta(gate):
        return lora_linear(x, weight, bias, a, b, 0.5, gate) - F.linear(x, weight, bias)

    torch.testing.assert_close(delta(2 * gate - 3 * other), 2 * delta(gate) - 3 * delta(other), rtol=0, atol=1e-11)


@given(shapes, st.data())
def test_one_hot_gate_is_that_adapter_alone(shape, data):
    x, weight, bias, a, b, _ = draw(shape)
    k = data.draw(st.integers(0, shape["domains"] - 1))
    gate = F.one_hot(torch.full((len(x),), k), shape["domains"]).double()
    part = slice(k * shape["rank"], (k + 1) * shape["rank"])
    alone = lora_linear(x, weight, bias, a[part], b[:, part], 2.0)
    torch.testing.assert_close(lora_linear(x, weight, bias, a, b, 2.0, gate), alone, rtol=0, atol=1e-11)


@given(shapes)
def test_one_domain_with_gate_one_is_lora_and_domains_may_be_permuted(shape):
    x, weight, bias, a, b, gate = draw({**shape, "domains": 1})
    ones = torch.ones_like(gate)
    assert torch.equal(lora_linear(x, weight, bias, a, b, 2.0, ones), lora_linear(x, weight, bias, a, b, 2.0))
    x, weight, bias, a, b, gate = draw(shape)
    order = torch.randperm(shape["domains"], generator=torch.Generator().manual_seed(shape["seed"]))
    rows = (order[:, None] * shape["rank"] + torch.arange(shape["rank"])).flatten()
    permuted = lora_linear(x, weight, bias, a[rows], b[:, rows], 1.0, gate[:, order])
    torch.testing.assert_close(permuted, lora_linear(x, weight, bias, a, b, 1.0, gate), rtol=0, atol=1e-11)


@given(shapes, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_zero_b_is_bitwise_the_base(shape, dtype):
    x, weight, bias, a, b, gate = draw(shape, dtype)
    assert torch.equal(lora_linear(x, weight, bias, a, torch.zeros_like(b), 4.0, gate), F.linear(x, weight, bias))


@given(shapes)
def test_an_image_alone_equals_the_image_in_a_batch(shape):
    x, weight, bias, a, b, gate = draw(shape)
    whole = lora_linear(x, weight, bias, a, b, 1.0, gate)
    for i in range(len(x)):
        alone = lora_linear(x[i : i + 1], weight, bias, a, b, 1.0, gate[i : i + 1])
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=0, atol=1e-12)


def test_gradients_of_x_a_b_and_gate():
    shape = dict(batch=2, tokens=3, inputs=4, outputs=5, rank=2, domains=3, seed=0)
    x, weight, bias, a, b, gate = draw(shape)
    inputs = [tensor.requires_grad_() for tensor in (x, a, b, gate)]
    assert torch.autograd.gradcheck(lambda x, a, b, gate: lora_linear(x, weight, bias, a, b, 0.7, gate), inputs)


def test_refuses_a_wrong_gate():
    x, weight, bias, a, b, gate = draw(dict(batch=2, tokens=3, inputs=4, outputs=5, rank=2, domains=3, seed=0))
    with pytest.raises(ValueError, match="gate"):
        lora_linear(x, weight, bias, a, b, 1.0, gate[:1])
    with pytest.raises(ValueError, match="gate"):
        lora_linear(x, weight, bias, a, b, 1.0, torch.ones(2, 4, dtype=torch.float64))


def test_an_implementation_is_put_into_every_layer_once():
    """And only a module that has all the operations can be."""
    vit = tiny_vit()
    layers = [module for module in vit.modules() if hasattr(module, "ops")]
    assert len(layers) == 2 * (4 + 1 + 1)  # of two blocks: four Linear, Attention, Mlp
    for module in (fused, ops):
        use_ops(vit, module)
        assert all(layer.ops.lora_linear is module.lora_linear for layer in layers)
        assert all(
            layer.ops.attention is module.attention for layer in copy.deepcopy(vit).modules() if hasattr(layer, "ops")
        )
    with pytest.raises(AttributeError, match="lora_linear"):
        use_ops(vit, F)


@pytest.mark.parametrize("module", [ops, fused])
def test_frozen_unless_a_mix_is_given(module):
    """A bare call runs the frozen layers; Mix() weighs each pair by one, Mix(gate) by the image's weights."""
    vit = tiny_vit(depth=1).double().requires_grad_(False)
    block, x = vit.blocks[0], torch.randn(2, 17, 16, dtype=torch.float64)
    use_ops(vit, module)
    frozen = block(x)
    add_lora(vit, TARGETS["attn+mlp"], rank=3, alpha=6, num_domains=2)
    vit.double()
    randomise_adapters(vit)
    ones = torch.ones(2, 2, dtype=torch.float64)
    assert torch.equal(block(x), frozen) and not torch.allclose(block(x, Mix()), frozen)
    torch.testing.assert_close(block(x, Mix()), block(x, Mix(ones)), rtol=0, atol=1e-12)
    torch.testing.assert_close(block(x, Mix(0 * ones)), frozen, rtol=0, atol=1e-12)


def all_adapted(layer_scale, num_domains):
    """A tiny float64 ViT whose layers all have adapters, and a mix for two images."""
    vit = ViT(dataclasses.replace(tiny_vit().config, layer_scale=layer_scale, act="quick_gelu"), 32)
    init_weights(vit)
    vit.requires_grad_(False)
    add_lora(vit, TARGETS["attn+mlp"], rank=3, alpha=6, num_domains=num_domains)
    vit.double()
    randomise_adapters(vit)
    gate = torch.tensor([[0.2, 0.7, 0.1], [0.5, 0.25, 0.25]], dtype=torch.float64) if num_domains > 1 else None
    return vit, Mix(gate)


@pytest.mark.parametrize("layer_scale", [True, False])
@pytest.mark.parametrize("num_domains", [1, 3])
def test_fused_blocks_equal_the_reference(layer_scale, num_domains):
    """Outputs and gradients in float64: all layers adapted, CLS alone or all tokens."""
    vit, mix = all_adapted(layer_scale, num_domains)
    x = torch.randn(2, 17, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(p for p in vit.parameters() if p.requires_grad)]
    for num_queries in (None, 1):
        vit.keep_queries(num_queries)
        found = []
        for module in (ops, fused):
            use_ops(vit, module)
            y = vit.encode(x, mix)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
        assert found[0][0].shape[1] == (num_queries or 17)
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("layer_scale", "num_domains", "num_queries"), [(True, 3, None), (False, 1, 1)])
@pytest.mark.parametrize("module", [ops, fused])
def test_a_block_compiles_to_one_graph(module, layer_scale, num_domains, num_queries):
    torch.compiler.reset()
    vit, mix = all_adapted(layer_scale, num_domains)
    vit.keep_queries(num_queries)
    use_ops(vit, module)
    x = torch.randn(2, 17, 16, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(vit.blocks[1], backend="aot_eager", fullgraph=True)(x, mix)
    torch.testing.assert_close(compiled, vit.blocks[1](x, mix), rtol=0, atol=1e-12)


def test_attention_is_softmax_of_scaled_dot_products():
    qkv = torch.randn(2, 5, 3 * 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = split_heads(qkv, 3)  # (B, nh, N, hd) each
    for head in range(3):
        columns = slice(4 * head, 4 * head + 4)
        for part, heads in zip(qkv.split(12, dim=2), (q, k, v), strict=True):
            assert torch.equal(heads[:, head], part[..., columns])
        weights = torch.softmax(q[:, head] @ k[:, head].mT / 2, dim=-1)
        expected = weights @ v[:, head]
        torch.testing.assert_close(attention(qkv, 3)[..., columns], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(attention(qkv, 3, 2)[..., columns], expected[:, :2], rtol=0, atol=1e-12)
        torch.testing.assert_close(attention_map(qkv, 3)[:, head].double(), weights, rtol=0, atol=1e-6)


def test_scaling_formulas():
    assert lora_scaling("lora", 16, 16) == 1.0
    assert lora_scaling("rslora", 16, 16) == 4.0
    with pytest.raises(ValueError, match="lora, rslora"):
        lora_scaling("none", 16, 16)


@pytest.mark.parametrize(("targets", "per_block"), [("attn", 2), ("attn+mlp", 4)])
def test_targets_are_whole_paths(targets, per_block):
    vit = tiny_vit()
    add_lora(vit, TARGETS[targets], rank=2, alpha=2)
    adapted = {name.rsplit(".", 1)[0] for name in adapter_state_dict(vit)}
    assert adapted == {f"blocks.{i}.{target}" for i in range(2) for target in TARGETS[targets]}
    assert len(adapted) == 2 * per_block
    for name in ("proj", "attn", "patch_embed.proj", "qkv"):  # what a match by substring would accept
        with pytest.raises(ValueError, match="names no layer"):
            add_lora(tiny_vit(), (name,), rank=2, alpha=2)


def test_adding_keeps_the_keys_and_the_output():
    vit = tiny_vit()
    images = torch.randn(2, 3, 32, 32)
    before, keys = vit(images), set(vit.state_dict())
    add_lora(vit, TARGETS["attn+mlp"], rank=3, alpha=3)
    assert torch.equal(vit(images), before) and torch.equal(vit(images, Mix()), before)  # B is zero
    assert keys < set(vit.state_dict())
    assert {key for key in vit.state_dict() if key not in keys} == set(adapter_state_dict(vit))


def test_merged_equals_unmerged_and_dalora_refuses():
    vit = tiny_vit().double()
    add_lora(vit, TARGETS["attn+mlp"], rank=3, alpha=6)
    vit.double()
    randomise_adapters(vit)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    adapted = vit(images, Mix())
    assert not torch.allclose(adapted, vit(images))
    merged = copy.deepcopy(vit)
    merge_lora(merged)
    assert not adapter_state_dict(merged)
    torch.testing.assert_close(merged(images), adapted, rtol=0, atol=1e-12)
    dalora = tiny_vit()
    add_lora(dalora, TARGETS["attn"], rank=3, alpha=6, num_domains=3)
    before = {key: tensor.clone() for key, tensor in dalora.state_dict().items()}
    with pytest.raises(ValueError, match="blocks.0.attn.qkv has 3 domains"):
        merge_lora(dalora)
    assert all(torch.equal(tensor, before[key]) for key, tensor in dalora.state_dict().items())


class Twin(nn.Module):
    """A PEFT-able model with plain linears, as the second oracle."""

    def __init__(self, linear):
        super().__init__()
        self.fc = nn.Linear(linear.in_features, linear.out_features).double()
        self.fc.load_state_dict({"weight": linear.weight, "bias": linear.bias})

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize(("formula", "use_rslora"), [("lora", False), ("rslora", True)])
def test_peft_agrees(formula, use_rslora):
    peft = optional("peft")
    ours = Linear(6, 10).double()
    theirs = peft.get_peft_model(
        Twin(ours), peft.LoraConfig(r=4, lora_alpha=12, target_modules=["fc"], use_rslora=use_rslora)
    )
    ours.add_lora(4, lora_scaling(formula, 12, 4), 1, None)
    ours.double()
    randomise_adapters(ours)
    layer = theirs.base_model.model.fc
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(ours.lora_a)
        layer.lora_B["default"].weight.copy_(ours.lora_b)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x, Mix()), theirs.double()(x), rtol=0, atol=1e-6)
