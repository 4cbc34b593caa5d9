"""NumPy twin of the weighted un-permute, bit for bit."""

from __future__ import annotations

import numpy as np

from cumoe.config import Array


def finalize(rows: Array, topk_weights: Array | None, permuted_idx: Array, out: Array) -> Array:
    """Write ``sum over k of weights[t, k] * rows[permuted_idx[t, k]]`` to `out`.

    Columns ascending, product and sum each rounded to float32, slots of -1 skipped. Weights of None
    are ones.
    """
    total = np.zeros(out.shape, np.float32)
    ones = np.ones(permuted_idx.shape, np.float32)
    weights = ones if topk_weights is None else topk_weights.astype(np.float32)
    for k in range(permuted_idx.shape[1]):
        held = np.flatnonzero(permuted_idx[:, k] >= 0)
        x = rows[permuted_idx[held, k]].astype(np.float32)
        total[held] += weights[held, k, None] * x
    with np.errstate(over="ignore"):
        out[...] = total.astype(out.dtype)
    return out
