"""What several test files share: golden data, bit views, and the comparison rule."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

DATA = Path(__file__).parent / "data"


def golden(name: str) -> dict[str, np.ndarray]:
    """All arrays of `tests/data/{name}.npz`; bf16 values are stored as uint16 bit patterns."""
    with np.load(DATA / f"{name}.npz") as archive:
        return dict(archive)


def bf16(bits: np.ndarray) -> jax.Array:
    """The bf16 array whose bit patterns are `bits` (uint16)."""
    assert bits.dtype == np.uint16, f"{bits.dtype=}"
    return jnp.asarray(bits.view(jnp.bfloat16))


def assert_close(
    ours: object,
    reference: object,
    *,
    abs_tol: float,
    rel_tol: float,
    cos_tol: float | None = None,
) -> None:
    """Each element within `abs_tol` or `rel_tol`; NaN and both infinities at the same places.

    `cos_tol` bounds 1 - 2<a,b>/(<a,a>+<b,b>) over the finite elements, which sees a small error
    that all elements share.
    """
    a = np.asarray(ours, dtype=np.float64)
    b = np.asarray(reference, dtype=np.float64)
    assert a.shape == b.shape, f"{a.shape=} {b.shape=}"
    for mask in (np.isnan, np.isposinf, np.isneginf):
        np.testing.assert_array_equal(mask(a), mask(b), err_msg=mask.__name__)
    finite = np.isfinite(b)
    a, b = a[finite], b[finite]
    difference = np.abs(a - b)
    bad = (difference > abs_tol) & (difference > rel_tol * np.abs(b))
    assert not bad.any(), (
        f"{bad.sum()} of {bad.size} elements differ; worst absolute {difference.max():.3g}, "
        f"e.g. {a[bad][:4]} against {b[bad][:4]}"
    )
    if cos_tol is not None:
        norm = float(a @ a + b @ b)
        distance = 1.0 - 2.0 * float(a @ b) / norm if norm else 0.0
        assert distance <= cos_tol, f"{distance=} exceeds {cos_tol=}"
