"""Rotary embedding against complex multiplication and the published YaRN numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla.model import MLAConfig, Rope, apply_rope

DEEPSEEK_V32 = Rope(theta=10000.0, factor=40.0, original_context=4096)
KIMI_K2 = Rope(theta=50000.0, factor=32.0, original_context=4096, beta_fast=1.0)


@pytest.mark.parametrize(
    ("rope", "pair15", "pair31"),
    [(DEEPSEEK_V32, 8.334509e-3, 3.333804e-6), (KIMI_K2, 6.271303e-3, 8.764413e-7)],
)
def test_yarn_frequencies_are_the_published_models(rope, pair15, pair31):
    frequencies = rope.frequencies(64)
    np.testing.assert_allclose(frequencies[[15, 31]], [pair15, pair31], rtol=2e-6)


@pytest.mark.parametrize(
    ("nope", "rope", "sm_scale"),
    [
        (128, DEEPSEEK_V32, 0.1352337789),
        (192, Rope(theta=1e6), 0.0625),
        (128, KIMI_K2, 0.1308608000),
        (128, Rope(factor=40.0, mscale_all_dim=0.707), 0.1147213868),
    ],
)
def test_sm_scale_is_the_published_models(nope, rope, sm_scale):
    config = MLAConfig(hidden_size=64, num_heads=1, q_lora_rank=8, qk_nope_head_dim=nope, rope=rope)
    assert config.sm_scale == pytest.approx(sm_scale, rel=1e-9)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_is_complex_multiplication(interleaved):
    x = jax.random.normal(jax.random.key(0), (5, 3, 8))
    positions = jnp.array([0, 1, 7, 100, 8191], jnp.int32)
    rope = Rope(theta=100.0)
    got = np.asarray(apply_rope(x, positions, rope, interleaved=interleaved))
    pairs = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(4), slice(4, None))
    turned = np.exp(1j * np.asarray(positions)[:, None, None] * rope.frequencies(8))
    want = (np.asarray(x[..., pairs[0]]) + 1j * np.asarray(x[..., pairs[1]])) * turned
    np.testing.assert_allclose(got[..., pairs[0]], want.real, atol=2e-3)
    np.testing.assert_allclose(got[..., pairs[1]], want.imag, atol=2e-3)


def test_dot_products_depend_on_distance_alone():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 64))
    rope = Rope()

    def dot(query_position, key_position):
        turned = [
            apply_rope(x, jnp.array([p], jnp.int32), rope, interleaved=True)
            for x, p in ((q, query_position), (k, key_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert dot(9, 4) == pytest.approx(dot(105, 100), abs=1e-3)
    assert dot(9, 4) != pytest.approx(dot(9, 5), abs=1e-2)


def test_dtype_is_kept_and_heads_are_optional():
    x = jnp.ones((2, 64), jnp.bfloat16)
    turned = apply_rope(x, jnp.zeros((2,), jnp.int32), Rope(), interleaved=False)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, x)
