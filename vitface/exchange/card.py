"""The model card: README.md of a published model. Its text is in card.md.j2."""

from typing import Any

from vitface.config import FaceConfig
from vitface.templates import render
from vitface.version import __version__
from vitface.weights.sources import SOURCES

RESEARCH_ONLY = "non-commercial-research"


def model_card(
    repository: str,
    config: FaceConfig,
    data: str,
    licence: str,
    results: dict[str, dict[str, Any]],
    thresholds: dict[str, Any] | None,
) -> str:
    """The card of a model that will lie at `repository`.

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
