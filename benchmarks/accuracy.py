"""Errors of attention against float64 NumPy, for a few query tokens."""

import math
from typing import NamedTuple

import numpy as np


class Errors(NamedTuple):
    """How far a result is off.

    Attributes:
        out: relative error of the outputs in the L2 norm, over all sampled tokens and heads.
        lse: largest absolute error of the log-sum-exp.
    """

    out: float
    lse: float


def sample(tokens: int, count: int) -> np.ndarray:
    """At most `count` of the numbers below `tokens`, from the first to the last."""
    return np.unique(np.linspace(0, tokens - 1, min(count, tokens)).round().astype(np.int64))


def attend(
    q: np.ndarray, keys: np.ndarray, *, sm_scale: float, value_dim: int
) -> tuple[np.ndarray, np.ndarray]:
    """Softmax attention in f64: q [n, h, width] to keys [n, k, width] -> out, lse."""
    q, keys = q.astype(np.float64), keys.astype(np.float64)
    logits = sm_scale * (q @ np.swapaxes(keys, 1, 2))
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - top)
    total = weights.sum(-1, keepdims=True)
    out = (weights / total) @ keys[..., :value_dim]
    return out, (top + np.log(total))[..., 0]


def compare(
    out: np.ndarray, lse: np.ndarray, exact_out: np.ndarray, exact_lse: np.ndarray
) -> Errors:
    """The errors of `out` [n, h, value] and `lse` [n, h]; infinite where a result is not finite.

    Raises:
        ValueError: the shapes do not match.
    """
    if out.shape != exact_out.shape or lse.shape != exact_lse.shape:
        raise ValueError(
            f"{out.shape=} {lse.shape=}: expected {exact_out.shape} and {exact_lse.shape}"
        )
    norm = float(np.linalg.norm(exact_out))
    errors = Errors(
        float(np.linalg.norm(out.astype(np.float64) - exact_out)) / norm,
        float(np.abs(lse.astype(np.float64) - exact_lse).max()),
    )
    return Errors(*(error if math.isfinite(error) else math.inf for error in errors))
