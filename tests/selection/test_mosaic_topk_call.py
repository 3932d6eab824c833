"""Which selections reach the kernel, and with what; a stand-in computes in its place."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from jmla import _implementation, _mosaic_topk
from pallas_kernels.select_topk.shape import Shape
from pallas_kernels.select_topk.tuning import Filtered, Resident, choose

kernels = pytest.importorskip("pallas_kernels.select_topk", reason="needs Pallas for GPUs")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The shapes, k and conversions that the kernel was called with."""
    seen: list[tuple[Any, ...]] = []

    def stand_in(scores, lengths, k, *, starts, conversion, operands):
        seen.append((scores.shape, k, conversion))
        positions = jmla.select_topk(scores, lengths, k, row_starts=starts, implementation="xla")
        if isinstance(conversion, kernels.PagedSlots):
            return jmla.paged_indices(
                positions,
                operands["page_table"],
                page_size=conversion.page_size,
                requests=operands.get("requests"),
            )
        if isinstance(conversion, kernels.RaggedRows):
            return jmla.ragged_indices(positions, operands["offsets"])
        return positions

    monkeypatch.setattr(kernels, "select_topk", stand_in)
    # A function of its own: traces of another test call another stand-in.
    fresh = jax.jit(lambda *given: _mosaic_topk._select(*given), static_argnums=(2, 3))
    monkeypatch.setattr(_mosaic_topk, "_compiled", fresh)
    return seen


def inputs(*batch: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)

    def ints(low: int, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(low, high, (*batch, *shape)), jnp.int32)

    return {
        "scores": jnp.asarray(rng.standard_normal((*batch, 4, 40)), jnp.float32),
        "lengths": ints(0, 41, 4),
        "starts": ints(-1, 20, 4),
        "table": ints(-1, 30, 4, 9),
        "requests": ints(-1, 5, 4),
        "offsets": ints(0, 99, 4),
    }


FORMS: dict[str, Any] = {
    "positions": lambda x, how: jmla.select_topk(
        x["scores"], x["lengths"], 7, row_starts=x["starts"], implementation=how
    ),
    "slots": lambda x, how: jmla.select_paged_indices(
        x["scores"],
        x["lengths"],
        7,
        x["table"],
        page_size=5,
        requests=x["requests"],
        implementation=how,
    ),
    "own slots": lambda x, how: jmla.select_paged_indices(
        x["scores"], x["lengths"], 7, x["table"], page_size=5, implementation=how
    ),
    "rows": lambda x, how: jmla.select_ragged_indices(
        x["scores"],
        x["lengths"],
        7,
        x["offsets"],
        row_starts=x["starts"],
        implementation=how,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_kernel_gets_what_the_jnp_path_gets(calls, form: str):
    x = inputs()
    np.testing.assert_array_equal(FORMS[form](x, "mosaic_gpu"), FORMS[form](x, "xla"))
    ((shape, k, conversion),) = calls
    assert (shape, k) == ((4, 40), 7)
    assert (conversion is None) == (form == "positions")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", [(), ("table", "requests", "offsets", "lengths")])
def test_vmap_makes_one_batch_of_rows(calls, form: str, shared: tuple[str, ...]):
    x = inputs(3)
    x |= {name: x[name][0] for name in shared}
    axes = ({name: None if name in shared else 0 for name in x},)

    def mapped(how: str) -> jax.Array:
        return jax.vmap(lambda x: FORMS[form](x, how), in_axes=axes)(x)

    np.testing.assert_array_equal(mapped("mosaic_gpu"), mapped("xla"))
    # Before it asks for a rule, vmap traces the call of one element, too.
    assert calls[-1][0] == (12, 40)


def test_none_takes_the_kernel_on_hopper_alone(calls, monkeypatch):
    x = inputs()
    for hopper in (False, True):
        monkeypatch.setattr(_implementation, "on_hopper", lambda hopper=hopper: hopper)
        jmla.select_topk(x["scores"], x["lengths"], 7)
        assert bool(calls) == hopper
    jmla.select_topk(x["scores"], x["lengths"], 5000)
    jmla.select_topk(x["scores"][:0], x["lengths"][:0], 7)
    table = jnp.zeros((4, 0), jnp.int32)
    jmla.select_paged_indices(x["scores"], x["lengths"], 7, table, page_size=5)
    assert len(calls) == 1


def test_scores_have_no_derivatives(calls):
    x = inputs()

    def loss(scores: jax.Array) -> jax.Array:
        positions = FORMS["positions"]({**x, "scores": scores}, "mosaic_gpu")
        taken = jnp.take_along_axis(scores, jnp.maximum(positions, 0), axis=1)
        return jnp.sum(taken)

    gradient = jax.grad(loss)(x["scores"])
    assert calls and bool(jnp.all(gradient >= 0)) and bool(jnp.any(gradient == 1))


def test_limits_are_those_of_the_kernel():
    assert _mosaic_topk.LARGEST_K == kernels.LARGEST_K
    assert _mosaic_topk.MOST_COLUMNS == kernels.MOST_COLUMNS
    assert not _mosaic_topk.unsupported_reasons((1, kernels.MOST_COLUMNS), kernels.LARGEST_K)


def test_a_gpu_is_full_of_blocks_and_no_row_is_too_long():
    for columns in (1, 4095, 8192, 32768, 65535, 131072, 1 << 20):
        for rows in (1, 16, 64, 132, 4096):
            for k in (1, 512, 2048, 4096):
                shape = Shape(rows, columns, k, has_starts=False, conversion=None)
                tuning = choose(shape)
                shared = 4 * (64 + 4096 + shape.words(tuning.threads) + 2 * tuning.capacity)
                assert shared <= 226 * 1024, shape
                if isinstance(tuning, Resident):
                    held = tuning.threads * tuning.vectors * shape.vector
                    assert held >= columns and tuning.vectors * shape.vector <= 32
                else:
                    assert isinstance(tuning, Filtered) and tuning.capacity > k
                    assert rows * tuning.blocks <= max(132, rows)
