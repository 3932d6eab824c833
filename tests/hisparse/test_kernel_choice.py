"""Which swaps and fetches reach the kernels, and with what; stand-ins compute in their place."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import _implementation
from jmla.hisparse import (
    HiSparseState,
    Residency,
    _mosaic,
    append,
    init_state,
    plan_swap,
    replay,
    swap_in,
)
from jmla.hisparse.lru import plan_by_xla
from tests.hisparse.residencies import random_residency, random_selection
from tests.hisparse.test_lifecycle import SIZES
from tests.layouts.cases import FORMATS, assert_same_rows, small_rows

kernels = pytest.importorskip("pallas_kernels.hot_buffer", reason="needs Pallas for GPUs")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes of the swaps and the names of the arrays of the fetches that were asked for."""
    seen: list[Any] = []

    def swap(shape: Any, *, positions: Any, seq_lens: Any, **tables: Any) -> Any:
        seen.append(shape)
        return kernels.Planned(*plan_by_xla(Residency(sizes=SIZES, **tables), positions, seq_lens))

    def copy(
        stored: Any, buffer: Any, sources: Any, targets: Any, *, num_sources: int, num_targets: int
    ) -> Any:
        seen.append(list(stored))
        moves = (sources >= 0) & (targets >= 0)
        fetched = {}
        for name, rows in buffer.items():
            flat = rows.reshape(num_targets, -1)
            taken = stored[name].reshape(num_sources, -1)[jnp.where(moves, sources, 0)]
            at = jnp.where(moves, targets, num_targets)
            fetched[name] = flat.at[at].set(taken, mode="drop").reshape(rows.shape)
        return fetched

    def swap_and_copy(shape: Any, stored: Any, buffer: Any, **given: Any) -> Any:
        planned = swap(shape, **given)
        counts = {
            "num_sources": shape.num_pages * shape.page_size,
            "num_targets": shape.num_buffer_pages * shape.page_size,
        }
        copied = copy(stored, buffer, planned.sources, planned.targets, **counts)
        return planned.tokens, planned.lru, planned.rows, copied

    monkeypatch.setattr(kernels, "plan_swap", swap)
    monkeypatch.setattr(kernels, "copy_rows", copy)
    monkeypatch.setattr(kernels, "swap_rows", swap_and_copy)
    # Functions of their own: traces of another test call other stand-ins.
    for name in ("_plan", "_copy", "_swap"):
        old = getattr(_mosaic, name)
        fresh = jax.custom_batching.custom_vmap(lambda *given, old=old: old.fun(*given))
        fresh.def_vmap(old.vmap_rule)
        monkeypatch.setattr(_mosaic, f"_compiled{name}", jax.jit(fresh))
    return seen


def state_and_selection(name: str) -> tuple[HiSparseState, jax.Array, jax.Array]:
    rng = np.random.default_rng(3)
    sizes = dataclasses.replace(SIZES, requests=2)
    wide = dataclasses.replace(sizes, requests=3, num_pages=20, num_buffer_pages=8)
    residency, lengths = random_residency(rng, wide)
    residency = dataclasses.replace(jax.tree.map(lambda table: table[:2], residency), sizes=sizes)
    layout, options = FORMATS[name]
    rows, buffer = (
        small_rows(name, pages, 4, seed=seed)
        for seed, pages in enumerate((sizes.num_pages, sizes.num_buffer_pages))
    )
    options = options | {"rank": rows.rank, "rope_dim": rows.rope_dim}
    state = init_state(layout, sizes, host_memory="device", **options)
    state = dataclasses.replace(state, host_rows=rows, buffer_rows=buffer, residency=residency)
    positions = random_selection(rng, residency, lengths[:2], 5)
    return state, jnp.asarray(positions), jnp.asarray(lengths[:2])


def swapped(*given: Any, **how: Any) -> Any:
    """`swap_in` under a jit of its own, which chooses anew."""
    return jax.jit(lambda *given: swap_in(*given, **how))(*given)


@pytest.mark.parametrize("name", ["pow2", "fp8_scale"])
def test_the_kernels_swap_on_a_hopper(name: str, calls: list[Any], monkeypatch: pytest.MonkeyPatch):
    state, positions, lens = state_and_selection(name)
    monkeypatch.setattr(_implementation, "on_hopper", lambda: False)
    expected = swapped(state, positions, lens)
    assert not calls
    monkeypatch.setattr(_implementation, "on_hopper", lambda: True)
    assert_same_rows(swapped(state, positions, lens), expected)
    shape, fetched = calls
    assert (shape.requests, shape.positions, shape.size, shape.newest) == (2, 5, 6, 2)
    assert (shape.context, shape.num_pages, shape.num_buffer_pages) == (24, 12, 4)
    assert fetched == list(state.host_rows.token_leaves)
    assert_same_rows(swapped(state, positions, lens, implementation="xla"), expected)
    assert len(calls) == 2

    def by_parts(state: HiSparseState) -> Any:
        residency, swap = plan_swap(state.residency, positions, lens)
        return replay(state, residency, swap), swap.slots

    assert_same_rows(jax.jit(by_parts)(state), expected)
    assert calls[2:] == calls[:2]


def test_vmap_is_done_by_xla():
    """Which runs here, where the kernels do not."""
    state, positions, lens = state_and_selection("bf16")
    both = jnp.stack([positions, positions[:, ::-1]])

    def swap(implementation: Any) -> Any:
        one = functools.partial(swap_in, state, seq_lens=lens, implementation=implementation)
        return jax.jit(jax.vmap(lambda p: one(positions=p)))(both)

    assert_same_rows(swap("mosaic_gpu"), swap("xla"))


def test_what_the_kernels_cannot_do_says_why():
    state, positions, lens = state_and_selection("bf16")
    sizes = dataclasses.replace(SIZES, device_buffer_size=20000, num_buffer_pages=6000)
    none = jnp.zeros((2, 17000), jnp.int32)
    with pytest.raises(NotImplementedError, match=r"17000 positions of .* at most 16384"):
        plan_swap(Residency.empty(sizes), none, lens, implementation="mosaic_gpu")
    sizes = dataclasses.replace(SIZES, max_length=1 << 21, page_size=64)
    with pytest.raises(NotImplementedError, match=r"2097152 positions .* bytes of shared memory"):
        plan_swap(Residency.empty(sizes), positions, lens, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="expected 'mosaic_gpu', 'xla'"):
        swap_in(state, positions, lens, implementation="cuda")  # type: ignore[arg-type]
    tiny = init_state(state.layout, SIZES, rank=2, rope_dim=1)
    new = jnp.zeros((2, 1, 3), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="BF16Rows"):
        append(tiny, lens, new, implementation="mosaic_gpu")
