"""Alarms of a run whose losses are finite, but which no longer learns: collapsed embeddings, unused domains.

They are computed once an epoch on the held-out people, in eval mode: in train mode, the head's batch norm spreads even
constant embeddings.
"""

import numpy as np

COLLAPSED = 0.99  # mean cosine of different images above which embeddings have collapsed,
USELESS = 0.7  # if the AUC is below this as well: an offset that all embeddings share does no harm
UNUSED = 0.01  # mean weight of a domain below which it is unused, as a fraction of the even share 1 / K


def alarms(embeddings: np.ndarray, auc: float, gates: np.ndarray | None) -> dict[str, str]:
    """Unit-norm embeddings (n, E), the AUC of their pairs, and domain weights (n, K) or None -> {alarm: sentence}.

    A sentence has the likely cause and what to change; {} if all is well.
    """
    found, n = {}, len(embeddings)
    cosine = (np.square(embeddings.sum(axis=0, dtype=np.float64)).sum() - n) / (n * (n - 1))
    if cosine > COLLAPSED and auc < USELESS:
        found["collapse"] = (
            f"the embeddings are nearly constant (mean cosine {cosine:.4f} between held-out images, AUC {auc:.3f}); "
            f"likely causes: --lr or --identity-lr too high, or a --margin too hard for so early an epoch"
        )
    if gates is not None:
        usage = gates.mean(axis=0, dtype=np.float64)
        dead = np.flatnonzero(usage < UNUSED / len(usage))
        if len(dead):
            found["dead router"] = (
                f"domain {', '.join(map(str, dead))} of {len(usage)} gets almost no image (mean gates "
                f"{', '.join(f'{share:.4f}' for share in usage)}); its adapter no longer learns; "
                f"raise --balance-loss-weight or lower --num-domains"
            )
    return found
