"""Bytes that came from elsewhere come back as they were, whatever they are."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.layouts import from_bytes, to_bytes
from tests.layouts.cases import FORMATS

RANK, ROPE_DIM = 128, 16


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "v4"])
@hypothesis.given(data=st.data())
def test_any_row_of_bytes_round_trips(name, data):
    layout, options = FORMATS[name]
    width = layout.bytes_per_token(RANK, ROPE_DIM)
    packed = data.draw(hnp.arrays(np.uint8, (2, 3, width)))
    rows = from_bytes(jnp.asarray(packed), layout, rank=RANK, rope_dim=ROPE_DIM, **options)
    assert rows.shape == (2, 3)
    rows.check()
    np.testing.assert_array_equal(to_bytes(rows), packed)


@hypothesis.given(data=st.data(), shape=st.sampled_from([(1, 0), (3, 9), (5, 1)]))
def test_any_page_of_bytes_round_trips(data, shape):
    page_size, spare = shape
    layout, _ = FORMATS["v4"]
    used = page_size * layout.bytes_per_token(RANK, ROPE_DIM)
    packed = data.draw(hnp.arrays(np.uint8, (2, used + spare)))
    rows = from_bytes(
        jnp.asarray(packed), layout, rank=RANK, rope_dim=ROPE_DIM, page_size=page_size
    )
    rows.check()
    expected = packed.copy()
    expected[:, used:] = 0  # the padding of the page, and of each token's scale bytes
    footer = expected[:, page_size * (RANK + 2 * ROPE_DIM) : used]
    footer.reshape(2, page_size, 8)[..., RANK // 64 :] = 0
    np.testing.assert_array_equal(to_bytes(rows, page_bytes=used + spare), expected)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "v4"])
def test_round_trip_under_jit_and_vmap(name):
    layout, options = FORMATS[name]
    width = layout.bytes_per_token(RANK, ROPE_DIM)
    packed = np.random.default_rng(0).integers(0, 256, (4, 3, width), np.uint8)

    def trip(packed: jax.Array) -> jax.Array:
        rows = from_bytes(packed, layout, rank=RANK, rope_dim=ROPE_DIM, **options)
        return to_bytes(rows.reshape(3))

    np.testing.assert_array_equal(jax.jit(jax.vmap(trip))(packed), packed)
