"""A model's bundle for the Hugging Face Hub: written with a model card, and uploaded."""

import re
from pathlib import Path
from typing import Any

from vitface.config import FaceConfig
from vitface.data.formats.samples import load_samples
from vitface.data.synthetic.worlds import SYNTHETIC
from vitface.errors import ConfigError, DataError, ExchangeError
from vitface.evaluation.report import results_json
from vitface.evaluation.scores import SCORES, load_scores
from vitface.exchange.bundle import face_files, write_folder
from vitface.store.faces import Checkpoint
from vitface.templates import render
from vitface.version import __version__
from vitface.weights.sources import SOURCES

RESEARCH_ONLY = "non-commercial-research"


def write_bundle(checkpoint: Checkpoint, out: Path, repository: str, data: str | None, licence: str | None) -> None:
    """Writes a checkpoint's folder with a new card.

    `data` describes what the model was trained on, and `licence` is an identifier of the Hub; both have defaults for
    procedural faces. ConfigError where the card would lack one, ExchangeError for a model without adapters.
    """
    config, calibration = checkpoint.config, checkpoint.calibration
    if not config.lora_rank:
        raise ExchangeError(f"{checkpoint.path} has no adapters: everything in it is published already")
    synthetic = checkpoint.settings.get("train_data") in SYNTHETIC
    data = data or ("procedural faces, drawn by vitface: no person's" if synthetic else None)
    if data is None:
        raise ConfigError("describe the training data with --data; the card is public, and a path may name somebody")
    licence = licence or ("apache-2.0" if synthetic else RESEARCH_ONLY)
    if not re.fullmatch(r"[a-z0-9.-]+", licence):
        raise ConfigError(f"--licence {licence} is not an identifier of the Hub, such as mit or cc-by-nc-4.0")
    card = model_card(repository, config, data, licence, results_of(checkpoint), calibration)
    files = face_files(checkpoint.load(), checkpoint.backbone, calibration)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out, {"": {**files, "README.md": card.encode()}})


def model_card(
    repository: str,
    config: FaceConfig,
    data: str,
    licence: str,
    results: dict[str, dict[str, Any]],
    thresholds: dict[str, Any] | None,
) -> str:
    """The card, README.md, of a model that will lie at `repository`; its text is in card.md.j2.

    `data` describes in words what it was trained on. `results` are `vitface.evaluation.report.results_json`,
    `thresholds` `vitface.store.thresholds.read_calibration`; where one of them is empty, the card states that.
    """
    return render(
        "exchange/card.md.j2",
        repository=repository,
        config=config,
        source=SOURCES.get(config.backbone),
        data=data,
        licence=licence,
        research_only=RESEARCH_ONLY,
        results=results,
        thresholds=thresholds,
        version=__version__,
    )


def results_of(checkpoint: Checkpoint) -> dict[str, dict]:
    """The results of this very checkpoint among the run's scores; empty if it was not evaluated."""
    if checkpoint.run is None or not (checkpoint.run / SCORES).is_file():
        return {}
    results, model = load_scores(checkpoint.run / SCORES)
    return results_json(results) if model == checkpoint.sha256 else {}


def people_of(checkpoint: Checkpoint) -> list[str]:
    """The names of the training people, which no card may hold; empty if the training data is gone."""
    try:
        return list(load_samples(checkpoint.settings["train_data"]).names)
    except (DataError, OSError, KeyError, TypeError):
        return []


def upload(repository: str, files: dict[str, bytes]) -> str:
    """Uploads the files in one commit and returns the repository's address; ExchangeError if the Hub refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi

    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        operations = [CommitOperationAdd(name, data) for name, data in files.items()]
        api.create_commit(repository, operations, commit_message="Model of vitface")
    except Exception as error:  # its own, its HTTP library's, the system's
        reason = str(error).strip().split("\n")[0]
        message = f"the Hub did not take {repository} ({reason}); are you logged in?\n  hf auth login"
        raise ExchangeError(message) from None
    return str(url)
