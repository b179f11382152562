"""Alarms: a run that goes on, with finite losses, although it has stopped learning what it should.

Judged on the held-out people once an epoch, in eval mode: in train mode the batch norm of the head spreads even
constant embeddings out.
"""

import numpy as np

COLLAPSED = 0.99  # mean cosine between different images, if in addition
USELESS = 0.7  # the AUC is below this: an offset that all embeddings share does no harm by itself
UNUSED = 0.01  # mean gate of a domain, as a fraction of the even share 1 / K


def alarms(embeddings: np.ndarray, auc: float, gates: np.ndarray | None) -> dict[str, str]:
    """Unit-norm embeddings (n, E), the AUC of their pairs and gates (n, K), None for plain LoRA -> what is wrong.

    A sentence with the likely cause, by the alarm's name; empty if nothing is.
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
