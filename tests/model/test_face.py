import dataclasses

import numpy as np
import pytest
import torch
from conftest import randomise_adapters, tiny_face, tiny_vit

from vitface.config import resolve
from vitface.model.counts import parameter_counts
from vitface.model.face import FaceModel, PatchesHead
from vitface.model.lora import Mix
from vitface.model.router import Router, load_balance_loss, subsample_patches
from vitface.model.vit import ViT, init_weights
from vitface.recogniser import Recogniser
from vitface.training.setup import build_margin, build_model


def trainable(**flags):
    config = dataclasses.replace(resolve({"weights": "random", **flags}), device="cpu", dtype="fp32")
    model, margin = build_model(config), build_margin(config, num_people=10)
    return parameter_counts(model), margin.weight.numel()


def test_parameter_counts_of_the_recorded_experiments():
    lora, identities = trainable(exp="exp_001")
    assert lora["all"] == (22_268_288, 639_488)
    assert lora["adapters"] == (442_368, 442_368)
    assert lora["head"] == (197_120, 197_120)
    assert identities == 10 * 512  # the identity matrix is counted apart
    assert trainable(exp="exp_001", train_patch_embed=True)[0]["all"] == (22_268_288, 865_664)
    assert trainable(exp="exp_003")[0]["all"][1] == 1_623_555
    assert trainable(exp="exp_003")[0]["router"] == (99_331, 99_331)
    assert trainable(exp="exp_003", train_patch_embed=True)[0]["all"][1] == 1_849_731
    assert trainable(exp="exp_001", lora_targets="attn+mlp")[0]["adapters"][0] == 1_179_648


def test_only_adapters_router_and_head_take_gradients():
    model = tiny_face(num_domains=3).train()
    randomise_adapters(model)
    embedding, _, logits = model(torch.randn(4, 3, 32, 32))
    (embedding.square().sum() + logits.sum()).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    frozen = {name for name, _ in tiny_vit().named_parameters()}
    assert not {name.removeprefix("vit.") for name in with_gradient} & frozen
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= with_gradient
    assert sum("lora_a" in name for name in with_gradient) == 4
    assert {"router.fc1.weight", "router.fc2.bias", "head.norm.weight"} <= with_gradient


@pytest.mark.parametrize("head", ["pretrained", "linear", "bn", "patches"])
@pytest.mark.parametrize("num_domains", [1, 3])
def test_an_image_alone_equals_the_image_in_a_batch(head, num_domains):
    model = tiny_face(head=head, num_domains=num_domains, embedding_dim=16 if head == "pretrained" else 8)
    randomise_adapters(model)
    images = np.random.default_rng(0).integers(0, 256, (5, 112, 112, 3), np.uint8)
    whole = Recogniser(model).embed(images)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    for i in range(5):
        np.testing.assert_allclose(Recogniser(model).embed(images[i : i + 1])[0], whole[i], atol=1e-5)
    np.testing.assert_allclose(Recogniser(model).embed(images, batch_size=2), whole, atol=1e-5)
    model.vit.double()
    tokens = model.vit.tokens(torch.randn(3, 3, 32, 32))
    weights, _ = model.route(tokens)
    alone = model.vit.encode(tokens[:1], Mix(None if weights is None else weights[:1].double()))
    together = model.vit.encode(tokens, Mix(None if weights is None else weights.double()))
    torch.testing.assert_close(alone, together[:1], rtol=0, atol=1e-12)


def test_the_gate_is_a_function_of_the_image_before_any_adapter():
    model = tiny_face(num_domains=3)
    images = np.random.default_rng(0).integers(0, 256, (4, 112, 112, 3), np.uint8)
    before = Recogniser(model).domain_weights(images)
    np.testing.assert_allclose(before.sum(axis=1), 1, atol=1e-6)
    randomise_adapters(model)
    np.testing.assert_array_equal(Recogniser(model).domain_weights(images), before)
    np.testing.assert_array_equal(Recogniser(tiny_face()).domain_weights(images), np.ones((4, 1), np.float32))


def test_domain_weights_reach_the_blocks():
    """With a router that always answers domain k, DA-LoRA is plain LoRA with the k-th pair."""
    dalora, lora = tiny_face(num_domains=3), tiny_face()
    randomise_adapters(dalora)
    images = np.random.default_rng(0).integers(0, 256, (2, 112, 112, 3), np.uint8)
    for k in range(3):
        with torch.no_grad():
            dalora.router.fc2.weight.zero_()
            dalora.router.fc2.bias.copy_(torch.eye(3)[k] * 200)
            for theirs, ours in zip(dalora.vit.blocks, lora.vit.blocks, strict=True):
                for target in ("qkv", "proj"):
                    a, b = getattr(theirs.attn, target), getattr(ours.attn, target)
                    b.lora_a.copy_(a.lora_a[4 * k : 4 * k + 4])
                    b.lora_b.copy_(a.lora_b[:, 4 * k : 4 * k + 4])
            lora.head.load_state_dict(dalora.head.state_dict())
        np.testing.assert_allclose(Recogniser(dalora).embed(images), Recogniser(lora).embed(images), atol=1e-6)


def test_patches_head_reads_every_token():
    head = PatchesHead(embed_dim=6, embedding_dim=4, num_tokens=5, levels=1).eval()
    tokens = torch.randn(2, 5, 6)
    base = head(tokens)
    expected = head.proj(head.reduce(tokens).flatten(1)) / (1 + head.norm.eps) ** 0.5
    torch.testing.assert_close(base, expected)
    for n in range(5):
        changed = tokens.clone()
        changed[:, n] += 1
        assert (head(changed) - base).abs().max() > 1e-3


def test_levels_are_the_tokens_after_evenly_spaced_blocks():
    """Of 12 blocks, 3 levels are 4, 8 and 12; the oracle runs the blocks one after the other."""
    vit = ViT(dataclasses.replace(tiny_vit().config, depth=12), 32).double()
    init_weights(vit)
    x = vit.tokens(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double())
    after = [x]
    for block in vit.blocks:
        after.append(block(after[-1]))

    def normalised(tokens):
        return (tokens - tokens.mean(-1, True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    for levels, earlier in ((1, []), (2, [6]), (3, [4, 8]), (5, [2, 4, 7, 9])):
        expected = torch.cat([vit.norm(after[12]), *(normalised(after[n]) for n in earlier)], -1)
        torch.testing.assert_close(vit.encode(x, levels=levels), expected, rtol=0, atol=1e-12)


def test_the_head_learns_from_every_level():
    model = tiny_face(head="patches", head_levels=2).train()
    model(torch.randn(4, 3, 32, 32))[0].square().sum().backward()
    weight = model.head.reduce.weight
    assert weight.shape == (32, 32) and all(half.abs().max() > 0 for half in weight.grad.chunk(2, dim=1))


def test_the_router_looks_at_every_second_row_and_column():
    tokens = torch.arange(26.0).view(1, 26, 1)
    assert subsample_patches(tokens, 1).flatten().tolist() == [0, 1, 3, 5, 11, 13, 15, 21, 23, 25]
    assert subsample_patches(tokens[:, :17], 1).flatten().tolist() == [0, 1, 3, 9, 11]
    model = tiny_face(num_domains=3)  # 4 x 4 patches
    x = model.vit.tokens(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    seen, elsewhere = x.clone(), x.clone()
    elsewhere[:, [2, 4, 5, 6, 7, 8]] += 1  # odd rows or columns
    seen[:, 3] += 1
    logits = model.route(x)[1]
    assert torch.equal(model.route(elsewhere)[1], logits) and not torch.equal(model.route(seen)[1], logits)
    mean_patch = model.vit.blocks[0](x[:, [0, 1, 3, 9, 11]])[:, 1:].mean(1)
    normalised = (mean_patch - mean_patch.mean(1, True)) / (mean_patch.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    hidden = torch.nn.functional.gelu(model.router.fc1(normalised))
    torch.testing.assert_close(logits, model.router.fc2(hidden))


def test_the_balance_loss_at_its_extremes():
    even, one = torch.full((6, 3), 1 / 3), torch.eye(3)[:1].repeat(6, 1)
    assert load_balance_loss(even).item() == pytest.approx(0, abs=1e-6)
    assert load_balance_loss(one).item() == pytest.approx(2)
    assert load_balance_loss(torch.eye(3)).item() == pytest.approx(0, abs=1e-6)  # each image decided, all used


def test_the_router_minds_neither_scale_nor_offset():
    router, vit, tokens = Router(16, 1, 3, depth=0), tiny_vit(), torch.randn(4, 10, 16)
    torch.testing.assert_close(router(tokens, vit)[1], router(3 * tokens + 2, vit)[1], rtol=1e-4, atol=1e-4)


def test_seeds_decide_the_initialisation():
    def tensors(seed):
        return {k: v for k, v in FaceModel(tiny_vit(), tiny_face(num_domains=2).config, seed=seed).state_dict().items()}

    first, again, other = tensors(1), tensors(1), tensors(2)
    assert all(torch.equal(first[key], again[key]) for key in first)
    for key in ("head.proj.weight", "router.fc1.weight", "vit.blocks.0.attn.qkv.lora_a"):
        assert not torch.equal(first[key], other[key])


@pytest.mark.parametrize("num_domains", [1, 3])
@pytest.mark.parametrize(("head", "num_queries"), [("bn", 1), ("patches", None)])
def test_the_last_block_computes_only_what_the_head_reads(num_domains, head, num_queries):
    model = tiny_face(num_domains=num_domains, head=head).double()
    randomise_adapters(model)
    tokens = model.vit.tokens(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double())
    mix = Mix(torch.tensor([[0.2, 0.7, 0.1], [1.0, 0.0, 0.0]]).double() if num_domains > 1 else None)
    seen = model.vit.encode(tokens, mix)
    assert model.vit.blocks[-1].attn.num_queries == num_queries and seen.shape[1] == (num_queries or 17)
    model.vit.keep_queries(None)
    torch.testing.assert_close(seen, model.vit.encode(tokens, mix)[:, :num_queries], rtol=0, atol=1e-13)


def crops(count=4):
    return np.random.default_rng(0).integers(0, 256, (count, 112, 112, 3), np.uint8)


@pytest.mark.parametrize("temperature", [0.2, 5.0])
def test_the_temperature_decides_how_decided_the_gate_is(temperature):
    model = tiny_face(num_domains=3, gate_temperature=temperature)
    with torch.no_grad():
        logits = model.route(model.tokens(torch.from_numpy(crops())))[1].double().numpy()
    expected = np.exp(logits / temperature)
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(gates(model, crops()), expected, atol=1e-6)
    np.testing.assert_allclose(Recogniser(model).domain_weights(crops()), expected, atol=1e-6)


def gates(model, images):
    """The weights that the blocks got, by spying on `encode`."""
    seen, encode = [], model.vit.encode

    def spy(tokens, mix, *rest):
        seen.append(mix.gate)
        return encode(tokens, mix, *rest)

    model.vit.encode = spy
    Recogniser(model).embed(images, flip=False)
    del model.vit.encode
    return torch.cat(seen).numpy()
