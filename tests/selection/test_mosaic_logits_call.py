"""Which calls of the indexer reach the kernel, and with what; a stand-in computes in its place."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jmla
from jmla import _implementation, _mosaic_logits
from jmla.layouts.index_keys import IndexKeyRows
from jmla.layouts.paged_index_keys import paged_index_keys
from tests.selection.index_cases import Case, paged, ragged

kernels = pytest.importorskip("pallas_kernels.indexer_logits", reason="needs Pallas for GPUs")


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes that the kernel was called with."""
    seen: list[Any] = []

    def stand_in(shape: Any, given: dict[str, jax.Array]) -> jax.Array:
        seen.append(shape)
        assert given["q"].shape == (shape.requests * shape.queries, shape.heads, shape.dim)
        assert given["ends"].shape == given["q"].shape[:1] == given["weights"].shape[:1]
        if shape.keys.packed:
            assert given["keys"].shape == (shape.keys.pages, shape.keys.page_bytes)
            keys = paged_index_keys(
                given["keys"], page_size=shape.keys.page_size, dim=shape.dim
            ).unpacked()
        else:
            keys = IndexKeyRows(given["keys"], given["scales"])
            assert keys.shape == (shape.keys.pages * shape.keys.page_size,)
        if shape.max_pages is None:
            return jmla.indexer_logits(
                given["q"], given["weights"], keys, given["starts"], given["ends"]
            )
        by_request = (shape.requests, shape.queries)
        out = jmla.paged_indexer_logits(
            given["q"].reshape(*by_request, shape.heads, shape.dim),
            given["weights"].reshape(*by_request, shape.heads),
            keys.reshape(shape.keys.pages, shape.keys.page_size),
            given["page_table"],
            given["ends"].reshape(by_request),
        )
        return out.reshape(-1, shape.columns)

    monkeypatch.setattr(kernels, "indexer_logits", stand_in)
    # A function of its own: traces of another test call another stand-in.
    fresh = jax.jit(lambda *given: _mosaic_logits._mapped(*given), static_argnums=2)
    monkeypatch.setattr(_mosaic_logits, "_compiled", fresh)
    return seen


def scored(case: Case, implementation: str | None = "mosaic_gpu") -> np.ndarray:
    given = case.queries
    if given.page_table is not None:
        return np.asarray(
            jmla.paged_indexer_logits(
                given.q,
                given.weights,
                case.keys,
                given.page_table,
                given.ends,
                implementation=implementation,
            )
        )
    assert given.starts is not None
    return np.asarray(
        jmla.indexer_logits(
            given.q[0],
            given.weights[0],
            case.keys,
            given.starts[0],
            given.ends[0],
            implementation=implementation,
        )[None]
    )


CASES = {
    "leaves": lambda: paged([[20, 3], [0, 33]], max_pages=4, page_size=10, heads=3, missing=1),
    "packed": lambda: paged([[20], [40]], max_pages=3, page_size=16, heads=3, form="packed"),
    "ragged": lambda: ragged([0, -3, 9], [7, 99, 2], 31, heads=5, dim=64),
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_gets_what_the_call_says(name: str, shapes: list[Any]):
    case = CASES[name]()
    np.testing.assert_allclose(scored(case), case.expected(), rtol=1e-5, atol=1e-5)
    (shape,) = shapes
    assert shape.keys.packed == (name == "packed")
    assert (shape.max_pages is None) == shape.has_starts == (name == "ragged")


def test_tokens_that_stand_alone_are_unpacked_first(shapes: list[Any]):
    case = ragged([0, 2], [30, 9], 32, heads=2)
    assert isinstance(case.keys, IndexKeyRows)
    paged_keys = paged_index_keys(case.keys.reshape(2, 16).pack(), page_size=16)
    alone = paged_keys.gather(jnp.arange(32, dtype=jnp.int32))
    got = scored(dataclasses.replace(case, keys=alone))
    np.testing.assert_allclose(got, case.expected(), rtol=1e-5, atol=1e-5)
    assert not shapes[0].keys.packed


def test_vmap_calls_it_for_each_entry(shapes: list[Any]):
    case = CASES["leaves"]()
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), case.queries)
    got = jax.vmap(_mosaic_logits.logits, in_axes=(0, None))(stacked, case.keys)
    np.testing.assert_allclose(got[1], case.expected()[::-1], rtol=1e-5, atol=1e-5)


def test_the_default_is_the_kernel_on_a_hopper_only(
    shapes: list[Any], monkeypatch: pytest.MonkeyPatch
):
    case = CASES["ragged"]()
    monkeypatch.setattr(_implementation, "on_hopper", lambda: False)
    without = scored(case, None)
    assert not shapes
    monkeypatch.setattr(_implementation, "on_hopper", lambda: True)
    # The stand-in's own call of the op must not come back here.
    monkeypatch.setattr(kernels, "indexer_logits", lambda *_: jnp.asarray(without[0]))
    np.testing.assert_array_equal(scored(case, None), without)


def query(*shape: int, dtype: Any = jnp.float8_e4m3fn) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def keys_of(*shape: int, dim: int = 128) -> IndexKeyRows:
    return jax.eval_shape(lambda: IndexKeyRows.zeros(shape, dim=dim))


@pytest.mark.parametrize(
    ("q", "keys", "reason"),
    [
        (query(2, 4, 128, dtype=jnp.bfloat16), keys_of(9), r"q\.dtype=.*e4m3"),
        (query(2, 65, 128), keys_of(9), "1 to 64 heads"),
        (query(2, 4, 96), keys_of(9, dim=96), r"\(64, 128\) values"),
        (query(0, 4, 128), keys_of(9), "at least one query and key"),
        (query(2, 4, 128), keys_of(0, 5), "at least one query and key"),
        (query(2, 4, 128), keys_of(1 << 18, 1024), "at most"),
        (
            query(2, 4, 128),
            paged_index_keys(jnp.zeros((3, 5 * 132), jnp.uint8), page_size=5),
            "multiples of 16",
        ),
    ],
)
def test_refusals_name_the_reason(q: Any, keys: Any, reason: str):
    (found,) = _mosaic_logits.unsupported_reasons(q, keys)
    with pytest.raises(NotImplementedError, match=reason):
        _implementation.choose("mosaic_gpu", [found], ("xla",))


def test_a_named_kernel_that_cannot_serve_raises():
    case = ragged([0], [9], 9, heads=2)
    q = case.queries.q[0].astype(jnp.bfloat16)
    window = (jnp.zeros(1, jnp.int32), jnp.full(1, 9, jnp.int32))
    with pytest.raises(NotImplementedError, match="quantize_index_query"):
        jmla.indexer_logits(
            q, case.queries.weights[0], case.keys, *window, implementation="mosaic_gpu"
        )
    with pytest.raises(ValueError, match="'mosaic_gpu', 'xla'"):
        jmla.indexer_logits(q, case.queries.weights[0], case.keys, *window, implementation="cuda")
