"""Counter-based random numbers: a number is a pure function of its keys, so nothing has a state to save or share."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(count: int, *keys: ArrayLike) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), a pure function of the integer keys: (count,); (B, count) if a key is an array (B,).

    SplitMix64 (Steele et al. 2014) of the keys, folded one after the other modulo 2^64.
    """
    words = [np.array([key % 2**64], np.uint64) if isinstance(key, int) else np.asarray(key) for key in keys]
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _mix(state + _GOLDEN + word.reshape(-1).astype(np.uint64))
    bits = _mix(state[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    numbers = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers if any(np.ndim(key) for key in keys) else numbers[0]


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
