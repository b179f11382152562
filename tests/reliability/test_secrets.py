"""No secret reaches what a run writes: not from the environment, and not from a flag that holds one."""

import itertools
import sys
import traceback
from types import SimpleNamespace

import pytest
import torch
from matrix import ROWS
from tiny import settings, use_tiny

from vitface.__main__ import main
from vitface.config import TrainConfig, resolve
from vitface.credentials import find_secret
from vitface.errors import ConfigError
from vitface.training import loop
from vitface.training.run import run

# variable of the environment -> its value, and the value as a flag might hold it
SECRETS = {
    "HF_TOKEN": ("hf_" + "aB3" * 11, "{}"),
    "WANDB_API_KEY": ("0123456789abcdef" * 2 + "01234567", "runs/{}"),
    "GITHUB_TOKEN": ("ghp_" + "x1Y" * 12, "https://{}@github.com/a/b"),
    "GITLAB_TOKEN": ("glpat-" + "Zz9-" * 5, "{}"),
    "AWS_ACCESS_KEY_ID": ("AKIA" + "ABCDEFGH12345678", "s3://{}/faces"),
    "AWS_SECRET_ACCESS_KEY": ("wJalrXUtnFEMI+K7MDENG+bPxRfiCYEXAMPLEKEY", "s3://key:{}@bucket/faces"),
    "OPENAI_API_KEY": ("sk-" + "proj-Ab12" * 4, "data/{}"),
    "GOOGLE_API_KEY": ("AIza" + "Sy0-_" * 7, "https://host/x?key={}"),
    "SLACK_TOKEN": ("xoxb-" + "1234567890-" * 2, "{}"),
    "DATABASE_URL": ("s3cr3tPassw0rd", "postgres://user:{}@host/faces"),
    "SESSION_TOKEN": ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.c2ln", "{}"),
    "SIGNED_URL": ("c2lnbmF0dXJlLXZhbHVl", "https://host/faces?X-Amz-Signature={}"),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    use_tiny(monkeypatch)


@pytest.fixture
def planted(monkeypatch):
    for name, (value, _) in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def tracked(monkeypatch):
    """What a tracker is given."""
    given = []

    def init(**options):
        given.append(options)
        return SimpleNamespace(log=lambda values, step: given.append(values), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return given


def hits(secret: str, sinks: dict[str, bytes]) -> list[str]:
    return [name for name, data in sinks.items() if secret.encode() in data]


def test_nothing_of_the_environment_is_written(tmp_path, monkeypatch, capfd, planted, tracked, ran):
    run(settings(tmp_path / "run", wandb=True))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", lambda optimizer, loss, *rest: BAD(optimizer, loss * float("nan"), *rest))
        with pytest.raises(ValueError, match="stopped before the update"):
            run(settings(tmp_path / "nan", wandb=True))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", lambda *arguments: 1 / 0)
        try:
            run(settings(tmp_path / "crash"))
        except ZeroDivisionError:
            traceback.print_exc()  # as an uncaught one is
    printed = capfd.readouterr()
    assert "ZeroDivisionError" in printed.err

    def read(pattern):
        files = [path for path in tmp_path.glob(pattern) if path.is_file()]
        assert files, pattern
        return b"\n".join(path.read_bytes() for path in files)

    sinks = {
        "settings": read("*/config.json"),
        "logs": read("*/log.*"),
        "checkpoints": read("*/checkpoints/step-*/*"),
        "results and diagnosis": read("run/results.md") + read("nan/non_finite.json"),
        "tracker": repr(tracked).encode(),
        "terminal and traceback": (printed.out + printed.err).encode(),
    }
    assert all(sinks.values())
    cases = list(itertools.product(SECRETS.values(), sinks))
    for (value, _), sink in cases:
        assert not hits(value, {sink: sinks[sink]}), sink
    everything = b"\n".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(hits(value, {"any file": everything}) for value, _ in SECRETS.values())
    for value, _ in SECRETS.values():  # the search would find them
        assert hits(value, {name: data + value.encode() for name, data in sinks.items()}) == list(sinks)
    assert len(cases) == ROWS["secrets"].cases.full
    ran(ROWS["secrets"].fault, len(cases))


BAD = loop.update


@pytest.mark.parametrize("flag", ["train_data", "weights", "val_data", "save_dir"])
@pytest.mark.parametrize("name", SECRETS)
def test_a_flag_that_holds_a_secret_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capfd, planted, name, flag
):
    monkeypatch.chdir(tmp_path)
    value, form = SECRETS[name]
    assert main(["train", f"--{flag.replace('_', '-')}", form.format(value)]) == 2
    printed = capfd.readouterr()
    assert f"--{flag.replace('_', '-')} holds" in printed.err and "settings are saved with the run" in printed.err
    assert not hits(value, {"terminal": (printed.out + printed.err).encode()})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError):
        TrainConfig(**{flag: form.format(value)})


@pytest.mark.parametrize(
    "value",
    [
        "data/casia-webface",
        "/home/someone/data/hf_faces",
        "runs/exp_001-20261121-101500",
        "C:\\data\\faces",
        "/root/.cache/huggingface/hub/models--a--b/snapshots/0123456789abcdef0123456789abcdef01234567/x.safetensors",
        "s3://bucket/faces",
        "https://host:8080/faces",
        "user@host:data",
        "data/token=1",
        "sk-learn/faces",
        "a@b",
    ],
)
def test_ordinary_settings_pass(value):
    assert find_secret(value, {"HOME": value, "SHORT_TOKEN": "data"}) is None
    assert resolve({"train_data": value}).train_data == value


WORDS = {  # none of them real
    "W&B": "wandb " + "0123456789" * 4,
    "AWS": "wJalrXUtnFEMI7K/MDENGbPxRfiCYEXAMPLEKEY1",
    "AWS, named": "aws_secret_access_key = abcdefgh",
    "header": "Authorization: Bearer abcDEF0123456789",
    "password": "password: hunter2!",
    "JSON": '"api_key": "abcdef123"',
    "Azure": "https://x.blob.core.windows.net/faces?sv=2024&sig=abc%2Bdef%3D",
    "npm": "npm_" + "aB3d" * 9,
    "PyPI": "pypi-AgEIcHlwaS5vcmc" + "aB3-" * 9,
    "Stripe": "sk_live_" + "aB3d" * 6,
    "Slack": "xapp-1-A0123456789-0123",
    "SSH": "-----BEGIN OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", WORDS)
def test_secrets_of_other_makers(kind):
    assert find_secret(f"see {WORDS[kind]} there", {})


@pytest.mark.parametrize(
    "name", ["SECRET_KEY", "GITHUB_PAT", "OPENAI_KEY", "KAGGLE_KEY", "DB_PASS", "db_password", "MYSQL_PWD", "my_token"]
)
def test_variables_that_hold_secrets(name):
    assert find_secret("data/hunter22", {name: "hunter22"}) == f"the value of ${name}"


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "PATH", "MONKEY", "KEYBOARD", "BYPASS", "PYTHONPATH", "TOKENIZERS"])
def test_variables_that_hold_none(name):
    assert find_secret("data/hunter22", {name: "hunter22"}) is None


@pytest.mark.parametrize("text", ["a://" + ":" * 300_000, "eyJ-" * 100_000, "a://x:" * 50_000, "aB3" * 100_000])
def test_a_long_text_is_searched_once(text):
    """In a time that grows as its square, this test would take hours."""
    assert find_secret(text, {}) in (None, "an AWS key")


@pytest.mark.parametrize("text", ["The class token: prepended", "key points: five", "commit@" + "0123456789" * 4])
def test_words_of_a_card_pass(text):
    assert find_secret(text, {}) is None


def test_a_bare_key_is_known_by_being_in_the_environment():
    key = "0123456789abcdef0123"
    assert find_secret(f"runs/{key}", {}) is None
    assert find_secret(f"runs/{key}", {"MY_API_KEY": key}) == "the value of $MY_API_KEY"
    assert find_secret(f"runs/{key}", {"MY_API_KEY_FILE": key}) is None
