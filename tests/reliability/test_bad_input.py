"""Files from strangers: a named error or what they claim to be; never code, never a half-loaded model."""

import io
import json
import random
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise_adapters, tiny_config, tiny_face
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matrix import ROWS, sizes
from mutation import NUMBERS, mutated, mutated_json, mutated_tensors, rewrite
from PIL import Image
from sandbox import assault

import vitface
from vitface.data.formats.bin_format import parse_bin
from vitface.data.formats.pairs import VerificationSet
from vitface.data.formats.samples import RecordSamples
from vitface.data.images import decode_image
from vitface.errors import CheckpointError, ConfigError, DataError, ImageError, VitfaceError
from vitface.files import sha256_file
from vitface.model.vit import ViT, init_weights
from vitface.presets import VIT_PRESETS
from vitface.store.faces import load_trained, open_checkpoint, trained_tensors
from vitface.store.settings import face_config, vit_config
from vitface.store.tensors import read_tensors
from vitface.training.runs.checkpoint import save_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))

from bin_files import LEGAL

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def encoded(kind, side, seed=0, **options):
    y, x = np.mgrid[:side, :side]
    pixels = np.stack([2 * x, 2 * y, x + y + seed], 2) % 256
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, kind, **options)
    return stream.getvalue()


def seal(step):
    """The manifest of the files as they are."""
    files = [step / name for name in ("model.safetensors", "model.json")]
    sealed = {file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)} for file in files}
    (step / "manifest.json").write_text(json.dumps({"files": sealed}))


OPCODES = [
    *b"cos\nsystem\n|(S'true'\ntR|Pid\n|c_codecs\nencode\n|cbuiltins\neval\n|h\0|q\0".split(b"|"),
    *b"\x8c\x05numpy\x8c\x07ndarray\x93|r\xff\xff\xff\x7f|B\xff\xff\xff\x7f|\x82\x01".split(b"|"),
    *(opcode + b"\xff" * 8 for opcode in (b"\x8e", b"\x95", b"\x96")),
    *(bytes([opcode]) for opcode in b"Rboi(tl]ea20.N\x81\x88\x93"),
]


@sizes("bin")
def test_bin_files(ran, cases):
    rng, originals = random.Random(0), list(LEGAL.values())

    def attempt(case):
        try:
            images, issame = parse_bin(mutated(rng, originals[case % len(originals)], OPCODES + NUMBERS), "here")
            found = VerificationSet("here", images, np.array(issame, bool))
        except DataError as error:
            assert str(error).startswith("here")
            return "error"
        assert len(found.images) == 2 * len(found.issame) and {type(image) for image in images} == {bytes}
        assert {type(flag) for flag in issame} == {bool}
        return "valid"

    assault(attempt, cases, lambda: [parse_bin(data, "here") for data in originals])
    ran(ROWS["bin"].fault, cases)


def write_records(folder):
    """InsightFace's layout: a header record, 4 images of 2 people, a range per person."""
    payloads = [struct.pack("<IfQQ2f", 2, 0, 0, 0, 5, 7)]
    payloads += [struct.pack("<IfQQ", 0, i // 2, i, 0) + encoded("JPEG", 112, i, quality=20) for i in range(4)]
    payloads += [struct.pack("<IfQQ2f", 2, 0, 0, 0, 1 + 2 * i, 3 + 2 * i) for i in range(2)]
    data, index = b"", ""
    for key, payload in enumerate(payloads):
        index += f"{key}\t{len(data)}\n"
        data += struct.pack("<II", 0xCED7230A, len(payload)) + payload + bytes(-len(payload) % 4)
    folder.mkdir()
    (folder / "train.rec").write_bytes(data)
    (folder / "train.idx").write_text(index)
    (folder / "property").write_text("2,112,112")


@sizes("rec")
def test_record_files(tmp_path, ran, cases):
    rng, folder = random.Random(0), tmp_path / "set"
    write_records(folder)
    originals = {name: (folder / name).read_bytes() for name in ("train.rec", "train.idx")}
    pieces = [*NUMBERS, struct.pack("<I", 0xCED7230A), struct.pack("<f", float("nan")), b"-1", b"\t", b"\n", b"9" * 30]

    def read_one(case=0):
        samples = RecordSamples(folder)
        return samples.read(case % len(samples))

    def attempt(case):
        name = ("train.rec", "train.idx")[case % 2]
        data = bytearray(originals[name])
        if name == "train.rec":  # in and around the headers: the images have a test of their own
            at = rng.choice([i for i in range(0, len(data), 4) if data[i : i + 4] == b"\x0a\x23\xd7\xce"])
            data[at : at + 40] = mutated(rng, data[at : at + 40], pieces)
        else:
            data = mutated(rng, data, pieces)
        rewrite(folder / name, data)
        try:
            image = read_one(case)
        except DataError as error:
            assert str(folder) in str(error)
            return "error"
        finally:
            rewrite(folder / name, originals[name])
        assert image.shape == (112, 112, 3) and image.dtype == np.uint8
        return "valid"

    assault(attempt, cases, read_one)
    ran(ROWS["rec"].fault, cases)


@sizes("images")
def test_images(ran, cases):
    rng = random.Random(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    originals = [encoded(kind, 24, exif=exif.tobytes()) for kind in ("JPEG", "PNG", "WEBP")]

    def attempt(case):
        data = mutated(rng, originals[case % 3], [*NUMBERS, b"Exif\0\0", b"IDAT", b"VP8L", b"\xff\xd9", b"\xff\xda"])
        try:
            image = decode_image(data, "here")
        except ImageError as error:
            assert str(error).startswith("here")
            return "error"
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        return "valid"

    assault(attempt, cases, lambda: [decode_image(data) for data in originals])
    ran(ROWS["images"].fault, cases)


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """A step directory with an adapter for the tiny backbone, and its model."""
    monkeypatch.setitem(VIT_PRESETS, "tiny", tiny_config())
    model = tiny_face(num_domains=2)
    randomise_adapters(model)
    settings = {**vars(model.config), "backbone": "tiny", "vit": vars(model.config.vit)}
    step = save_checkpoint(tmp_path / "run", 1, trained_tensors(model), settings, {}, {}, True)
    return step, model, settings


@sizes("safetensors")
def test_adapter_files(adapter, ran, cases):
    step, model, settings = adapter
    rng, tensors, trained = random.Random(0), step / "model.safetensors", trained_tensors(model)
    original, expected = tensors.read_bytes(), {name: t.clone() for name, t in model.state_dict().items()}

    def same():
        return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    def attempt_reading():
        rewrite(tensors, mutated_tensors(rng, original))
        try:
            found = read_tensors(tensors, trained)
        except CheckpointError as error:
            assert str(tensors) in str(error)
            return "error"
        assert all(t.shape == trained[name].shape and t.isfinite().all() for name, t in found.items())
        return "valid"

    def attempt_loading():
        rewrite(tensors, mutated_tensors(rng, original))
        try:
            load_trained(model, tensors)
        except CheckpointError:
            assert same()
            return "error"
        model.load_state_dict(expected)
        return "valid"

    def attempt_settings():
        """A stranger's checkpoint: other settings, sealed as they are."""
        rewrite(tensors, original)
        (step / "model.json").write_text(json.dumps(mutated_json(rng, settings)))
        seal(step)
        try:
            loaded = vitface.load(step)
        except VitfaceError:
            return "error"
        assert loaded.embed(np.zeros((1, 112, 112, 3), np.uint8)).shape == (1, loaded.config.embedding_dim)
        return "valid"

    def warm_up():
        load_trained(model, tensors)
        vitface.load(step).embed(np.zeros((1, 112, 112, 3), np.uint8))

    attempts = {0: attempt_settings, 1: attempt_loading, 2: attempt_loading}  # of every 20; the others only read
    assault(lambda case: attempts.get(case % 20, attempt_reading)(), cases, warm_up)
    ran(ROWS["safetensors"].fault, cases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_rank": 8192}, r"lora_a is torch.float32 .* expected torch.float32 \(16384,"),
        ({"lora_rank": 1 << 40}, "lora_rank cannot be 1099511627776"),
        ({"image_size": 8192}, "sizes that fit no model"),
        ({"gate_temperature": 0.0}, "sizes that fit no model"),
        ({"head": "patches", "head_levels": 0}, "sizes that fit no model"),
        ({"head": "patches", "head_levels": 99}, "sizes that fit no model"),
        ({"head": "linear", "head_levels": 2}, "sizes that fit no model"),
        ({"embedding_dim": 8192}, r"head.* expected torch.float32 \(8192,"),
        ({"lora_alpha": float("nan")}, "NaN is no number"),
        ({"lora_alpha": 1e308}, "lora_alpha cannot be 1e"),
        ({"lora_alpha": 10**400}, "lora_alpha cannot be 1000"),
        ({"gate_temperature": 1e-320}, "sizes that fit no model"),
        ({"vit": {"patch_size": 1}}, "sizes that fit no model"),
        ({"vit": {"patch_size": 512}}, "sizes that fit no model"),
        ({"vit": {"depth": 8192}}, "sizes that fit no model"),
        ({"vit": {"mlp_ratio": -4}}, "sizes that fit no model"),
        ({"vit": {"rope": "index", "num_heads": 8}}, "sizes that fit no model"),
        ({"vit": {"pool": "attention", "pool_heads": 0}}, "sizes that fit no model"),
        ({"vit": {"native_size": 7}}, "sizes that fit no model"),
        ({"vit": {"std": [0.2, 0.0, 0.2]}}, "sizes that fit no model"),
        ({"vit": {"norm_eps": 10**400}}, "norm_eps cannot be 1000"),
        ({"head": "tail"}, "head cannot be tail"),
        ({"num_domains": True}, "num_domains cannot be True"),
        ({"weights_sha256": 3}, "weights_sha256 cannot be 3"),
        ({"colour": 1}, "unexpected keyword"),
    ],
)
def test_settings_no_model_can_have_are_named(adapter, change, message):
    step, _, settings = adapter
    change = {**change, "vit": {**settings["vit"], **change.get("vit", {})}}
    text = json.dumps({**settings, **change})
    assert face_config(json.loads(json.dumps(settings))).backbone == "tiny"
    (step / "model.json").write_text(text)
    seal(step)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(step).load()


SIZES = {
    "native_size": st.integers(0, 80),
    "patch_size": st.integers(0, 40),
    "embed_dim": st.integers(0, 40),
    "depth": st.integers(0, 3),
    "num_heads": st.integers(0, 20),
    "mlp_ratio": st.floats(-9, 9),
    "registers": st.integers(0, 3),
    "class_token": st.booleans(),
    "pos_embed": st.booleans(),
    "rope": st.sampled_from(["none", "unit", "index"]),
    "pool": st.sampled_from(["cls", "attention", "tokens"]),
    "pool_heads": st.integers(0, 20),
    "pool_dim": st.integers(0, 20),
    "norm_eps": st.floats(-1, 1),
    "std": st.lists(st.floats(-1, 1), min_size=3, max_size=3),
}


@given(st.fixed_dictionaries({}, optional=SIZES))
@settings(max_examples=300)
@example({"mlp_ratio": -4.0})
@example({"rope": "unit", "num_heads": 8})
@example({"pool": "attention", "pool_heads": 3})
def test_settings_that_are_accepted_make_a_vit(changes):
    sizes = {**json.loads(json.dumps(vars(tiny_config()))), **changes}
    try:
        config = vit_config(sizes)
        vit = ViT(config, config.native_size)
    except (ValueError, ConfigError):
        return
    init_weights(vit)
    with torch.no_grad():
        found = vit.pool(vit(torch.zeros(1, 3, config.native_size, config.native_size)))
    assert found.shape == (1, config.output_dim) and found.isfinite().all()


def test_an_adapter_of_another_backbone_is_refused(adapter, tmp_path):
    step, _, settings = adapter
    other = {**settings, "vit": {**settings["vit"], "norm_eps": 0.5}}
    shutil.rmtree(step)
    save_checkpoint(tmp_path / "run", 1, trained_tensors(tiny_face(num_domains=2)), other, {}, {}, True)
    with pytest.raises(CheckpointError, match="describes another tiny than the backbone file"):
        open_checkpoint(step).load()
