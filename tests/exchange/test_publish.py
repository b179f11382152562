"""What is published loads elsewhere, says what it is, and holds nothing that must not leave."""

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml  # noqa: TID251, what the Hub reads a card with
from conftest import optional
from PIL import Image
from runs import EMBEDDING, NAME, face_on, faces, save_run, use_tiny
from safetensors.torch import load_file, save_file

import vitface
from vitface.__main__ import main
from vitface.config import FaceConfig
from vitface.errors import CheckpointError, ConfigError, ExchangeError
from vitface.evaluation.protocol import verify, verify_fixed
from vitface.evaluation.scores import keep_scores
from vitface.exchange.publishing import check_card, model_card
from vitface.store import hub
from vitface.store.backbone import backbone_bytes, read_backbone
from vitface.store.faces import Checkpoint, open_checkpoint
from vitface.store.hub import BUNDLE_FILES


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A trained DA-LoRA run in the working directory, with people and a photo of each still there."""
    monkeypatch.chdir(tmp_path)
    backbone = use_tiny(monkeypatch, tmp_path / "home")
    for person in ("Alice_Example", "Bob_Beispiel"):
        (tmp_path / "people" / person).mkdir(parents=True)
        Image.fromarray(faces(1)[0]).save(tmp_path / "people" / person / "1.png")
    return save_run(tmp_path / "run", face_on(backbone, num_domains=3, head="bn"), train_data="people")


def publish(*more: str) -> int:
    return main(["publish", "run", "--repo", "me/faces", "--data", "two people who agreed", "--out", "out", *more])


def test_a_dry_run_writes_and_uploads_nothing(run, uploaded, tmp_path, capsys):
    assert publish() == 0
    assert "dry run: nothing was uploaded" in capsys.readouterr().out and not uploaded
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(BUNDLE_FILES)


def test_what_is_uploaded_loads_elsewhere_and_computes_the_same(run, uploaded, tmp_path, monkeypatch, capsys):
    expected, thresholds = vitface.load(run).embed(faces()), vitface.load(run).thresholds
    assert publish("--upload") == 0 and "https://huggingface.co/me/faces" in capsys.readouterr().out
    assert set(uploaded) == set(BUNDLE_FILES)
    shutil.rmtree(run)
    for name, data in uploaded.items():
        (tmp_path / "elsewhere" / "snapshot").mkdir(parents=True, exist_ok=True)
        (tmp_path / "elsewhere" / "snapshot" / name).write_bytes(data)
    model = vitface.load(tmp_path / "elsewhere" / "snapshot")
    np.testing.assert_array_equal(model.embed(faces()), expected)
    assert model.thresholds == thresholds == {0.01: 0.25}
    everything = b"".join(uploaded.values())
    assert not any(word in everything for word in (b"margin", b"Alice", b"/home", str(tmp_path).encode()))


def test_the_same_weights_in_another_file_are_known_again(run, tmp_path):
    assert publish() == 0
    backbone = tmp_path / "home" / f"{NAME}.safetensors"
    expected = vitface.load("out").embed(faces())
    name, config, tensors, source = read_backbone(backbone)
    backbone.write_bytes(backbone_bytes(name, config, tensors, {**source, "file": "another.safetensors"}))
    np.testing.assert_array_equal(vitface.load("out").embed(faces()), expected)
    tensors["norm.weight"][0] += 1e-3
    backbone.write_bytes(backbone_bytes(name, config, tensors, source))
    with pytest.raises(CheckpointError, match="name the right file with --weights FILE"):
        vitface.load("out")


def reseal(out: Path) -> None:
    """Makes the manifest fit what lies there, as somebody who means it would."""
    manifest = json.loads((out / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (out / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    thresholds = json.loads((out / "thresholds.json").read_text())
    if thresholds["model"] != manifest["files"]["model.safetensors"]["sha256"]:
        thresholds["model"] = manifest["files"]["model.safetensors"]["sha256"]
        (out / "thresholds.json").write_text(json.dumps(thresholds, indent=1))
        return reseal(out)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1))


def add_tensor(name):
    def plant(out, source):
        tensors = load_file(out / "model.safetensors")
        save_file({**tensors, name: load_file(source)[name.removeprefix("vit.")]}, out / "model.safetensors")

    return plant


def change_json(file, **added):
    def plant(out, source):
        path = out / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **added}, indent=1))

    return plant


def write_in_card(text):
    return lambda out, source: (out / "README.md").write_text((out / "README.md").read_text() + text)


def copy_to(name):
    def plant(out, source):
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copy(source, out / name)

    return plant


def put_metadata(out, source):
    save_file(load_file(out / "model.safetensors"), out / "model.safetensors", {"people": "Alice_Example"})


def save_embeddings(out, source):
    np.save(out / "embeddings.npy", np.ones((4, 8), np.float32))


def link(out, source):
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(source)


TRAINING, BACKBONE = "run/checkpoints/step-7/training.safetensors", f"home/{NAME}.safetensors"
PHOTO, CONFIG = "people/Alice_Example/1.png", "run/config.json"
LEAKS = {  # where from, how, and what is said
    "the identity matrix as a file": (TRAINING, copy_to("training.safetensors"), "training.safetensors is not part of"),
    "the identity matrix in the model": (TRAINING, add_tensor("margin.weight"), "unknown tensor margin.weight"),
    "the backbone as a file": (BACKBONE, copy_to(f"{NAME}.safetensors"), f"{NAME}.safetensors is not part of a model"),
    "the backbone in the model": (BACKBONE, add_tensor("vit.norm.weight"), "unknown tensor vit.norm.weight"),
    "embeddings as a file": ("", save_embeddings, "embeddings.npy is not part of a model"),
    "embeddings beside the thresholds": (
        "",
        change_json("thresholds.json", embeddings=EMBEDDING),
        "thresholds.json is not what vitface writes",
    ),
    "embeddings in the card": ("", write_in_card(" ".join(map(str, EMBEDDING))), "a list of numbers"),
    "names in the settings": ("", change_json("model.json", people=["Alice_Example"]), "unexpected keyword"),
    "names for a hash": ("", change_json("model.json", weights_sha256="Alice_Example"), "is not a SHA-256"),
    "names in the manifest": (
        "",
        change_json("manifest.json", people=["Alice_Example"]),
        "manifest.json is not what vitface writes",
    ),
    "names in the model's metadata": ("", put_metadata, "model.safetensors is not what vitface writes"),
    "a name in the card": ("", write_in_card("Thanks to Alice Example!"), "the name of somebody"),
    "a photo": (PHOTO, copy_to("sample.png"), "sample.png is not part of a model"),
    "a photo under an innocent name": (PHOTO, copy_to("README.md"), "README.md has "),
    "a photo in a folder": (PHOTO, copy_to("assets/1.png"), "assets is not part of a model"),
    "a photo in the card": ("", write_in_card("![](data:image/png;base64,iVBORw0KGgo=)"), "an image"),
    "the run's settings": (CONFIG, copy_to("config.json"), "config.json is not part of a model"),
    "a link out of the folder": (CONFIG, link, "README.md is not part of a model"),
    "a path in the card": ("", write_in_card("trained on /home/alice/photos"), "a path on a machine"),
    "a token in the card": ("", write_in_card("hf_" + "aB3" * 11), "a Hugging Face token"),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_refused(run, uploaded, tmp_path, leak, capsys):
    assert publish() == 0
    source, plant, message = LEAKS[leak]
    plant(tmp_path / "out", tmp_path / source)
    reseal(tmp_path / "out")
    assert publish("--upload") == 2
    assert message in capsys.readouterr().err
    assert not uploaded


def test_without_a_leak_a_resealed_folder_and_an_edited_card_pass(run, uploaded, tmp_path):
    assert publish() == 0
    reseal(tmp_path / "out")
    write_in_card("\nWritten for a course, see https://example.org/data/course.\n")(tmp_path / "out", None)
    assert publish("--upload") == 0
    assert b"for a course" in uploaded["README.md"]


def test_a_repository_that_is_public_already_is_asked_for(run, uploaded, monkeypatch, capsys):
    huggingface_hub = optional("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.HfApi, "private", False)
    assert publish("--upload") == 2 and not uploaded
    assert "is public: nothing was uploaded; to publish there, pass --public" in capsys.readouterr().err
    assert publish("--upload", "--public") == 0 and uploaded
    assert "which is public" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        *(
            "thanks to anna schmidt",
            "ANNA SCHMIDT",
            "Anna  Schmidt",
            "Schmidt, Anna",
            "AnnaSchmidt",
            "Anna **Schmidt**",
        ),
        *("by Jo Li.", "JO-LI", "\u738b\u4f1f", "\u4f5c\u8005\uff1a\u738b\u4f1f\u3002", "\uae40\ubbfc\uc218\uc758"),
        *("Zoe\u0308 Kravitz", "Zoe Kravitz", "Z\u200bo\u00eb Kravitz", "\uff3a\uff4f\uff45 Kravitz", "kravitz_zoe"),
    ],
)
def test_names_are_found_in_every_form(text):
    people = ["Anna_Schmidt", "Jo_Li", "\u738b\u4f1f", "\uae40\ubbfc\uc218", "Zo\u00eb_Kravitz"]
    with pytest.raises(ExchangeError, match="the name of somebody"):
        check_card(f"a model {text}, 2026".encode(), people)


@pytest.mark.parametrize(
    "text",
    [
        *("file:///home/anna/x", "C:/Users/anna", "/scratch/anna", "/content/drive/MyDrive/anna", "/Volumes/anna/x"),
        *("/nfs/anna/x", "/kaggle/input", "//home/anna", "\\\\server\\anna", "(/data/faces)", "/HOME/anna"),
    ],
)
def test_paths_are_found_in_every_form(text):
    with pytest.raises(ExchangeError, match="a path on a machine"):
        check_card(f"trained on {text}".encode())


@pytest.mark.parametrize("tag", ["<script>", "<VIDEO src=x>", "<embed>", "<input type=image>", "<IMG src=x>", "< img>"])
def test_tags_that_load_something_are_found(tag):
    with pytest.raises(ExchangeError, match="a tag of HTML"):
        check_card(f"see {tag}".encode())


def test_where_the_people_are_not_known_it_is_said(run, uploaded, tmp_path, capsys):
    shutil.rmtree(tmp_path / "people")
    assert publish() == 0
    assert "NOT CHECKED: whether the card names somebody" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("see <img src=x>", "an image"),
        ("C:\\Users\\alice\\faces", "a path"),
        ("~/faces", "a path"),
        ("x" * 300, "a word of over 200"),
        ("https://someone:secret@host/faces", "a password"),
        ("\x00" * 40_000, "40,000 bytes"),
        ("", "0 bytes"),
        ("a model\n\nby Bob\nBeispiel.", r"the name of somebody in the training data \(Bob_Beispiel, line 3\)"),
        ("a model\nby Zo\u00eb Kravitz.", r"the name of somebody in the training data \(Zo\u00eb_Kravitz_2, line 2\)"),
        ("\n\u4f5c\u8005\uff1a\u738b\u4f1f", r"the name of somebody in the training data \(\u738b\u4f1f, line 2\)"),
    ],
)
def test_cards_are_searched(text, kind):
    with pytest.raises(ExchangeError, match=kind):
        check_card(text.encode(), ["Bob_Beispiel", "Zo\u00eb_Kravitz_2", "\u738b\u4f1f"])


def test_ordinary_cards_pass():
    check_card(
        b"accuracy 99.1234, and/or ~ 3 %, http://host/home/x, data/faces, Bob", ["Bob_B", "0001", "an", "Bob-01"]
    )


def test_the_words_of_the_card_itself_name_nobody(run, tmp_path, capsys):
    shutil.copytree(tmp_path / "people" / "Alice_Example", tmp_path / "people" / "Lora")
    assert publish() == 0 and "Lora" not in capsys.readouterr().err
    write_in_card("Thanks to Lora!")(tmp_path / "out", None)
    assert publish() == 2 and "(Lora, line " in capsys.readouterr().err


def test_what_a_checkpoint_has_beside_its_model_stays(run, uploaded, tmp_path):
    for name in ("people.csv", "embeddings.npy"):
        (tmp_path / "run" / "checkpoints" / "step-7" / name).write_bytes(b"Alice")
        (tmp_path / "run" / name).write_bytes(b"Alice")
    assert publish("--upload") == 0
    assert set(uploaded) == set(BUNDLE_FILES) and not any(b"Alice" in data for data in uploaded.values())


def test_another_models_folder_is_not_uploaded(run, uploaded, tmp_path, capsys):
    assert publish() == 0
    shutil.rmtree(run)
    save_run(run, face_on(tmp_path / "home" / f"{NAME}.safetensors", num_domains=3, head="linear"))
    assert publish("--upload") == 2 and not uploaded
    assert "holds another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repo", "faces"], "is not OWNER/NAME"),
        (["--licence", "do what you want"], "not an identifier of the Hub"),
        (["--data", "my photos in /home/alice/photos"], "a path on a machine"),
    ],
)
def test_flags_are_checked(run, flags, message, capsys):
    assert publish(*flags) == 2
    assert message in capsys.readouterr().err


def test_the_data_has_to_be_said_in_public_words(run, capsys):
    assert main(["publish", "run", "--repo", "me/faces"]) == 2
    assert "describe the training data with --data" in capsys.readouterr().err


def test_a_refusal_of_the_hub_is_said(run, monkeypatch, capsys):
    huggingface_hub = optional("huggingface_hub")

    def refuse(*arguments, **options):
        raise huggingface_hub.errors.LocalTokenNotFoundError("Token is required\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=refuse))
    assert publish("--upload") == 2
    assert "the Hub did not take me/faces (Token is required)" in capsys.readouterr().err


# The card


def test_the_card_is_what_the_hub_reads(run, tmp_path):
    ModelCard = optional("huggingface_hub").ModelCard

    generator = np.random.default_rng(0)
    issame = np.tile([True, False], 300)
    result = verify(np.where(issame, 0.8, 1.6) + 0.4 * np.tanh(generator.standard_normal(600)), issame)
    keep_scores(run, {"lfw": result}, open_checkpoint(run).sha256)
    assert publish() == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    (accuracy, auc, eer) = card.data.eval_results
    assert (accuracy.dataset_type, accuracy.metric_type) == ("lfw", "accuracy")
    found = [one.metric_value for one in (accuracy, auc, eer)]
    assert found == pytest.approx([result.accuracy, result.auc, result.eer], abs=1e-6)
    assert card.data.library_name == "vitface" and card.data.license_name == "non-commercial-research"
    assert f"| lfw | 600 | {100 * result.accuracy:.2f} ± {100 * result.std:.2f} |" in card.text
    assert "two people who agreed" in card.text and "not been tested for bias" in card.text
    assert "- false accept rate 0.01: 0.2500, accepts 90.00 % of the same pairs" in card.text
    assert 'vitface.load("hf://me/faces")' in card.text


@pytest.mark.parametrize(
    ("threshold", "row", "metrics"),
    [
        (math.nan, "| my_pairs.csv | 40 | - | - | 1.0000 | 0.00 |", ["auc", "eer"]),
        (1.0, "| my_pairs.csv | 40 | 100.00 | 91.24 to 100.00 | 1.0000 | 0.00 |", ["accuracy", "auc", "eer"]),
    ],
)
def test_the_card_of_pairs_without_folds(run, tmp_path, threshold, row, metrics):
    """Few pairs have no deviation, and without a calibrated threshold no accuracy."""
    issame = np.tile([True, False], 20)
    result = verify_fixed(np.where(issame, 0.5, 1.5), issame, threshold)
    keep_scores(run, {"my_pairs.csv": result}, open_checkpoint(run).sha256)
    assert publish() == 0
    text = (tmp_path / "out" / "README.md").read_text()
    found = yaml.safe_load(text.split("---\n")[1])["model-index"][0]["results"][0]["metrics"]
    assert row in text and [metric["type"] for metric in found] == metrics
    assert "the pairs\nwere too few for folds" in text and "10 folds" not in text


@pytest.mark.parametrize(
    ("backbone", "base"),
    [
        ("dinov2_vits14", "facebook/dinov2-small"),
        ("clip_vitb16", "openai/clip-vit-base-patch16"),
        ("vit_tiny_patch16", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ("vit_nano", None),
    ],
)
def test_the_card_names_the_backbone_and_clips_own_limits(backbone, base):
    from vitface.presets import VIT_PRESETS

    config = FaceConfig(backbone, "random", VIT_PRESETS[backbone], 224, lora_rank=16)
    checkpoint = Checkpoint(Path("x"), Path("x"), None, {"files": {"model.safetensors": {"sha256": "x"}}}, config)
    text = model_card(checkpoint, "me/x", "data", "mit")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front.get("base_model") == base and front["license"] == "mit"
    assert front.get("base_model_relation") == (base and "adapter")
    assert ("always out-of-scope" in text) == backbone.startswith("clip")
    assert (f"vitface fetch {backbone}" in text) == backbone.startswith(("dinov2", "clip"))
    assert "Not evaluated" in text and "None were calibrated" in text
    check_card(text.encode())


# The Hub, as `vitface.load` sees it


def test_load_takes_a_repository_of_the_hub(run, tmp_path, monkeypatch):
    huggingface_hub = optional("huggingface_hub")

    assert publish() == 0
    expected, asked = vitface.load(run).embed(faces()), []

    def snapshot_download(repository, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path / "out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    np.testing.assert_array_equal(vitface.load("hf://me/faces").embed(faces()), expected)
    vitface.load("hf://me/faces@0123abc")
    assert asked == [("me/faces", None, list(BUNDLE_FILES)), ("me/faces", "0123abc", list(BUNDLE_FILES))]


def test_a_folder_that_is_not_there_is_not_asked_for(run, tmp_path, monkeypatch, capsys):
    """A mistyped name would else become a stranger's model, of whoever has that account."""
    monkeypatch.setattr(hub, "download", lambda path: pytest.fail("asked the Hub"))
    for path in ("runs/typo", "typo", "/typo/typo", "a/b/c", "../typo"):
        with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint"):
            vitface.load(path)
    with pytest.raises(CheckpointError, match="for a model on the Hub, write hf://me/faces$"):
        vitface.load("me/faces")
    assert main(["info", "runs/mine"]) == 2


@pytest.mark.parametrize(
    "name", ["hf://faces", "hf://a/b/c", "hf://me/faces@../../x", "hf://me/..", "hf://", "hf:///x/"]
)
def test_what_is_no_repository_is_not_asked_for(monkeypatch, name):
    monkeypatch.setattr("vitface.store.hub.require", lambda *arguments: pytest.fail("asked the Hub"))
    with pytest.raises(CheckpointError, match="is not the name of a model on the Hub"):
        vitface.load(name)


def test_without_the_extra_the_answer_names_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"hf://me/faces(.*\n)* *pip install huggingface_hub"):
        vitface.load("hf://me/faces")


@pytest.mark.parametrize("error", ["LocalEntryNotFoundError", "HFValidationError", "OfflineModeIsEnabled"])
def test_what_the_hub_says_is_passed_on(monkeypatch, error):
    huggingface_hub = optional("huggingface_hub")

    def fail(*arguments, **options):
        raise getattr(huggingface_hub.errors, error)("cannot reach it\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"the Hub gives no me/faces \(cannot reach it\)"):
        vitface.load("hf://me/faces")


def test_a_bundle_from_a_stranger_is_checked_as_any_checkpoint(run, tmp_path):
    assert publish() == 0
    data = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        vitface.load("out")


def test_the_settings_a_model_is_published_with_are_those_it_was_trained_with(run, tmp_path):
    assert publish() == 0
    published = json.loads((tmp_path / "out" / "model.json").read_text())
    trained = dataclasses.asdict(vitface.load(run).config)
    assert published == json.loads(json.dumps(trained))
