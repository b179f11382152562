"""What DA-LoRA's router does with images: how sure it is, which domains it uses, whether they mean pose, age or light.

numpy only, but for `synthetic_routing`, which asks a model. Letters: B images, K domains, L labels.
"""

from typing import Any

import numpy as np

from vitface.data.synthetic import DOMAINS, TEST_PEOPLE, SyntheticSamples
from vitface.model.face import FaceModel


def entropy(weights: np.ndarray) -> np.ndarray:
    """How undecided the router is on each image: (B, K) -> (B,), 0 for one domain, 1 for all alike (nats / log K)."""
    logs = np.log(weights, out=np.zeros_like(weights), where=weights > 0)
    return -(weights * logs).sum(axis=1) / np.log(weights.shape[1])


def best_assignment(counts: np.ndarray) -> list[int]:
    """counts (K, L) -> for each label its domain, each domain used once at most, so that most images agree; needs
    K >= L. Exact, by dynamic programming over the sets of domains in use."""
    num_domains, num_labels = counts.shape
    if num_domains < num_labels:
        raise ValueError(f"{num_labels} labels cannot be assigned to {num_domains} domains")
    best: dict[frozenset[int], tuple[float, list[int]]] = {frozenset(): (0.0, [])}
    for label in range(num_labels):
        longer: dict[frozenset[int], tuple[float, list[int]]] = {}
        for used, (score, domains) in best.items():
            for domain in set(range(num_domains)) - used:
                candidate = (score + float(counts[domain, label]), [*domains, domain])
                longer[used | {domain}] = max(longer.get(used | {domain}, candidate), candidate)
        best = longer
    return max(best.values())[1]


def agreement(weights: np.ndarray, labels: np.ndarray) -> tuple[float, list[int]]:
    """(share of images whose strongest domain is their label's, the domain of each label) at the best assignment."""
    counts = np.zeros((weights.shape[1], labels.max() + 1))
    np.add.at(counts, (weights.argmax(axis=1), labels), 1)
    domains = best_assignment(counts)
    return float(sum(counts[domain, label] for label, domain in enumerate(domains)) / len(labels)), domains


def synthetic_routing(model: FaceModel, num_people: int = 60, images_per_person: int = 6) -> dict[str, Any]:
    """The router on procedural faces of people it has never seen, whose hard factor (pose, age or light) is known.

    {"usage": (K,) mean weight, "entropy": mean, "labels": names (L,), "weights": (L, K) mean weight for each label,
    "agreement": share or None with fewer domains than labels, "domain_of_label": list or None, "chance": 1 / L}.
    """
    samples = SyntheticSamples(num_people, images_per_person, first_person=TEST_PEOPLE.start)
    weights = model.domain_weights(samples.render(np.arange(len(samples))))
    share, domains = agreement(weights, samples.domains) if weights.shape[1] >= len(DOMAINS) else (None, None)
    return {
        "usage": weights.mean(axis=0).tolist(),
        "entropy": float(entropy(weights).mean()) if weights.shape[1] > 1 else 0.0,
        "labels": list(DOMAINS),
        "weights": [weights[samples.domains == label].mean(axis=0).tolist() for label in range(len(DOMAINS))],
        "agreement": share,
        "domain_of_label": domains,
        "chance": 1 / len(DOMAINS),
    }


def routing_text(routing: dict[str, Any]) -> str:
    """A line per label: the mean weight of each domain; then agreement, usage and entropy."""
    lines = [f"{'mean weight':<12}" + "".join(f"{f'domain {k}':>10}" for k in range(len(routing["usage"])))]
    for label, row in zip([*routing["labels"], "all"], [*routing["weights"], routing["usage"]], strict=True):
        lines.append(f"{label:<12}" + "".join(f"{weight:>10.3f}" for weight in row))
    found = "" if routing["agreement"] is None else f"agreement with the known labels {routing['agreement']:.1%}, "
    return "\n".join([*lines, f"{found}entropy {routing['entropy']:.3f} of 1"])
