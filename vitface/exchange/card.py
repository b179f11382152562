"""The model card: README.md of a published model. Its front matter is written by hand, with JSON strings, which YAML
takes as they are, so that no YAML library is needed."""

import json
from typing import Any

from vitface.config import FaceConfig
from vitface.version import __version__
from vitface.weights.sources import SOURCES

RESEARCH_ONLY = "non-commercial-research"
CLIP_CARD = "https://github.com/openai/CLIP/blob/main/model-card.md"
CLIP_NOTE = f"""The backbone is CLIP. [Its model card]({CLIP_CARD})
calls surveillance and facial recognition "always out-of-scope", and any deployed use "currently out of scope". This
model is for research on the method only.

"""
LIMITS = """- It compares faces, and neither finds nor aligns them: it takes crops in InsightFace's 112 x 112 template.
- It has not been tested for bias. Accuracy differs between groups of people, and the benchmarks below do not show by
  how much. It must not decide about anybody.
- Embeddings of faces are biometric data in many places: store and compare them only where the law allows it.
- Face data sets such as CASIA-WebFace, CelebA and LFW are for non-commercial research, and so is what they trained.
"""


def model_card(
    repository: str,
    config: FaceConfig,
    data: str,
    licence: str,
    results: dict[str, dict[str, Any]],
    thresholds: dict[str, Any] | None,
) -> str:
    """The card of a model that will lie at `repository`.

    `data` says in words what it was trained on. `results` are `vitface.evaluation.report.results_json`, `thresholds`
    `vitface.exchange.bundle.thresholds_of`; either may be empty, and the card then says so.
    """
    kind = "LoRA" if config.num_domains == 1 else f"DA-LoRA ({config.num_domains} domains)"
    source = SOURCES.get(config.backbone)
    origin = f"{source.origin}, {source.licence}" if source else "ships with vitface, Apache-2.0"
    fetch = f"\n    python -m vitface.weights.fetch {config.backbone}" if source and source.url else ""
    parts = "adapters, router and embedding head" if config.num_domains > 1 else "adapters and embedding head"
    clip = CLIP_NOTE if config.backbone.startswith("clip") else ""
    return f"""{_front_matter(repository, config, licence, results)}
# {repository.split("/")[1]}

A face recogniser: {config.backbone}, frozen, with {kind}; made with vitface {__version__}. Two aligned faces give
two unit vectors, and their dot product says how alike they are.

    pip install 'vitface[hub]'{fetch}

    import vitface
    model = vitface.load("{repository}")
    a, b = model.embed(["a.jpg", "b.jpg"])      # aligned 112 x 112 faces
    a @ b

The repository holds what was trained ({parts}) and no backbone, which is found on your
machine by its SHA-256.

## Use

{clip}For research on face verification and on low-rank adapters.

{LIMITS}
## Training

- Data: {data}
- Backbone: {config.backbone} ({origin}), at {config.image_size} pixels
- Adapters: rank {config.lora_rank}, alpha {config.lora_alpha:g} ({config.lora_scaling}), on {config.lora_targets}
- Head: {config.head}, {config.embedding_dim} values

## Results

{_results(results)}
## Thresholds

{_thresholds(thresholds)}
## Licence

{_licence(licence)} The backbone keeps its own licence.
"""


def _front_matter(repository: str, config: FaceConfig, licence: str, results: dict[str, dict[str, Any]]) -> str:
    source = SOURCES.get(config.backbone)
    base = source and (source.transformers or source.timm)
    lines = ["---", f"license: {'other' if licence == RESEARCH_ONLY else licence}"]
    lines += [f"license_name: {licence}"] * (licence == RESEARCH_ONLY)
    lines += ["library_name: vitface", "pipeline_tag: image-feature-extraction"]
    lines += [f"base_model: {base}", "base_model_relation: adapter"] if base else []
    lines += ["tags: [face-recognition, face-verification, lora]"]
    if results:
        lines += ["model-index:", f"- name: {json.dumps(repository)}", "  results:"]
    for name, result in results.items():
        lines += [
            "  - task: {type: image-feature-extraction, name: face verification}",
            f"    dataset: {{type: {name}, name: {name}}}",
            "    metrics:",
            f"    - {{type: accuracy, name: accuracy of 10 folds, value: {result['accuracy']!r}}}",
            f"    - {{type: auc, name: AUC, value: {result['auc']!r}}}",
            f"    - {{type: eer, name: equal error rate, value: {result['eer']!r}}}",
        ]
    return "\n".join([*lines, "---"])


def _results(results: dict[str, dict[str, Any]]) -> str:
    if not results:
        return "Not evaluated on any benchmark.\n"
    rows = [
        f"| {name} | {result['pairs']:,} | {100 * result['accuracy']:.2f} ± {100 * result['std']:.2f} | "
        f"{100 * result['interval'][0]:.2f} to {100 * result['interval'][1]:.2f} | {result['auc']:.4f} | "
        f"{100 * result['eer']:.2f} |"
        for name, result in results.items()
    ]
    head = ["| benchmark | pairs | accuracy ± std, % | 95 % interval | AUC | EER, % |", "|---|---|---|---|---|---|"]
    note = "10 folds, each image with its mirror image; the epoch was chosen on people held out of training."
    return "\n".join([*head, *rows, "", note, ""])


def _thresholds(thresholds: dict[str, Any] | None) -> str:
    if not thresholds:
        return "None were calibrated.\n"
    pairs = thresholds["pairs"]
    lines = [
        f"- false accept rate {far}: {entry['threshold']:.4f}, accepts {100 * entry['tar']:.2f} % of the same pairs"
        for far, entry in thresholds["thresholds"].items()
    ]
    counted = f"From {pairs['same']:,} same and {pairs['different']:,} different pairs of people held out of training:"
    return "\n".join([counted, "", *lines, ""])


def _licence(licence: str) -> str:
    if licence == RESEARCH_ONLY:
        return "The adapters, router and head are for non-commercial research only."
    return f"The adapters, router and head are under {licence}."
