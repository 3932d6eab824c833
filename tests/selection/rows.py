"""Rows of scores that are hard on a selection."""

import numpy as np

KINDS = (
    "normal",
    "ties",
    "equal",
    "few",
    "ascending",
    "descending",
    "last bits",
    "special",
    "misleading",
    "zeros",
    "subnormal",
    "far from zero",
)
SPECIAL = np.array(
    [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3.4e38, -3.4e38],
    np.float32,
)


def rows_of_kind(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """f32 [rows, columns].

    "last bits" differ in those alone; of "misleading" rows, any four neighbours are alike in most
    places and not where a sample with a stride looks; "zeros" are mostly that, of both signs.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind), columns])
    scores: np.ndarray = rng.standard_normal((rows, columns)).astype(np.float32)
    match kind:
        case "ties":
            scores = np.round(scores * 8) / 8
        case "equal":
            scores[:] = 1.5
        case "few":
            scores = np.round(scores)
        case "ascending":
            scores = np.sort(scores, axis=1)
        case "descending":
            scores = np.sort(scores, axis=1)[:, ::-1]
        case "last bits":
            one = np.float32(1).view(np.uint32)
            scores = (one + rng.integers(0, 4, scores.shape, np.uint32)).view(np.float32)
        case "special":
            scores = rng.choice(SPECIAL, scores.shape)
        case "misleading":
            scores = np.where(np.arange(columns) % 64 < 16, np.abs(scores) * 1e-3, scores - 50)
        case "zeros":
            scores = np.maximum(scores - 1.5, 0) * rng.choice([-1, 1], scores.shape)
        case "subnormal":
            scores = scores * np.float32(1e-42)
        case "far from zero":
            scores = scores * np.float32(1e-3) + 100
    return np.ascontiguousarray(scores, np.float32)
