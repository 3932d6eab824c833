"""The attention layers of two models, of random weights: what a step of them computes."""

import abc
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int

import jmla
from benchmarks.inputs import random_cache
from jmla import KVLayout
from jmla.attention import Implementation
from jmla.layouts.key_values import KeyValueRows, quantize_key_values
from jmla.model.config import MLAConfig
from jmla.model.mla import absorbed_query, init_mla, project, project_output
from jmla.norm import rms_norm
from jmla.rope import Rope, apply_rope

PAGE = 64
_STEP = 1 << 15  # tokens of a cache that are made at a time


class Inputs(NamedTuple):
    """Of a step.

    Attributes:
        params: of the layer.
        x: bf16 [b, hidden], normalised.
        table: int32 [b, max_pages].
        lengths: int32 [b], the new token included.
    """

    params: dict[str, Array]
    x: BFloat16[Array, "b hidden"]
    table: Int[Array, "b max_pages"]
    lengths: Int[Array, " b"]


class Layer(abc.ABC):
    """An attention layer, and a batch that it decodes.

    Attributes:
        params: of random weights.
    """

    hidden: int
    params: dict[str, Array]

    def __init__(self, b: int, s_kv: int, implementation: Implementation | None) -> None:
        """A batch of `b` requests of `s_kv` tokens."""
        self.b, self.s_kv, self.implementation = b, s_kv, implementation
        pages = -(-s_kv // PAGE)
        self.num_pages = b * pages
        order = np.random.default_rng(0).permutation(self.num_pages).reshape(b, pages)
        self.order = jnp.asarray(order, jnp.int32)

    def inputs(self) -> Inputs:
        """Of the step, always the same."""
        x = jax.random.normal(jax.random.key(1), (self.b, self.hidden), jnp.bfloat16)
        return Inputs(self.params, x, self.order, jnp.full(self.b, self.s_kv, jnp.int32))

    @property
    def slots(self) -> Int[Array, " b"]:
        """Of the new tokens."""
        last = self.s_kv - 1
        return self.order[:, last // PAGE] * PAGE + last % PAGE

    @abc.abstractmethod
    def cache(self, dtype: str) -> Any:
        """A cache with random tokens, the same for every dtype up to its rounding."""

    @abc.abstractmethod
    def bytes_per_token(self, cache: Any) -> int:
        """That the cache keeps of a token."""

    @abc.abstractmethod
    def queries(self) -> BFloat16[Array, "b one h width"]:
        """Of the attention alone."""

    @abc.abstractmethod
    def attend(self, cache: Any, q: Array) -> Array:
        """The attention alone."""

    @abc.abstractmethod
    def step(
        self, cache: Any, params: dict[str, Array], x: Array, table: Array, lengths: Array
    ) -> tuple[Float[Array, "b hidden"], Any]:
        """The layer's output, and the cache with the new tokens."""


class DeepSeekR1(Layer):
    """Dense MLA: 128 heads over latents of 512 + 64 values."""

    LAYOUTS: Mapping[str, KVLayout] = {
        "bfloat16": KVLayout.BF16,
        "fp8_e4m3": KVLayout.FP8_NOPE_FP8_ROPE,
        "fp4_e2m1": KVLayout.FP4,
    }
    config = MLAConfig(
        hidden_size=7168,
        num_heads=128,
        q_lora_rank=1536,
        index_n_heads=0,
        rope=Rope(factor=40.0, original_context=4096),
    )
    hidden = config.hidden_size

    def __init__(self, b: int, s_kv: int, implementation: Implementation | None) -> None:
        super().__init__(b, s_kv, implementation)
        self.params = init_mla(jax.random.key(0), self.config)

    def cache(self, dtype: str) -> jmla.Cache:
        """See `Layer.cache`."""
        slots = self.num_pages * PAGE
        return jmla.Cache(random_cache(self.LAYOUTS[dtype], slots=slots, page_size=PAGE))

    def bytes_per_token(self, cache: jmla.Cache) -> int:
        """See `Layer.bytes_per_token`."""
        return cache.bytes_per_token

    def queries(self) -> BFloat16[Array, "b one h width"]:
        """See `Layer.queries`."""
        shape = (self.b, 1, self.config.num_heads, self.config.latent_dim)
        return jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)

    def attend(self, cache: jmla.Cache, q: Array) -> Array:
        """See `Layer.attend`."""
        lengths = jnp.full(self.b, self.s_kv, jnp.int32)
        return self._attend(cache, q, self.order, lengths)

    def _attend(self, cache: jmla.Cache, q: Array, table: Array, lengths: Array) -> Array:
        out, _ = jmla.dense_decode(
            q,
            cache.rows,
            table,
            lengths,
            sm_scale=self.config.sm_scale,
            implementation=self.implementation,
        )
        return out

    def step(
        self, cache: jmla.Cache, params: dict[str, Array], x: Array, table: Array, lengths: Array
    ) -> tuple[Float[Array, "b hidden"], jmla.Cache]:
        """See `Layer.step`."""
        projections = project(params, self.config, x, lengths - 1)
        cache = jmla.append(cache, self.slots, projections.latents)
        q = absorbed_query(params, projections)[:, None]
        return project_output(params, self._attend(cache, q, table, lengths)[:, 0]), cache


class Qwen3(Layer):
    """Grouped-query attention: 64 query heads and 4 heads of the cache, of 128 values."""

    hidden, heads, kv_heads, head_dim = 4096, 64, 4, 128
    rope = Rope(theta=1e6)

    def __init__(self, b: int, s_kv: int, implementation: Implementation | None) -> None:
        super().__init__(b, s_kv, implementation)
        names = ("q", "k", "v")
        counts = (self.heads, self.kv_heads, self.kv_heads)
        keys = jax.random.split(jax.random.key(0), 4)
        self.params = {
            name: _weights(key, self.hidden, (self.hidden, count, self.head_dim))
            for key, name, count in zip(keys, names, counts, strict=False)
        }
        width = self.heads * self.head_dim
        self.params["out"] = _weights(keys[3], width, (self.heads, self.head_dim, self.hidden))

    def cache(self, dtype: str) -> KeyValueRows:
        """See `Layer.cache`."""
        tokens = self.num_pages * PAGE
        step = min(tokens, _STEP)

        @jax.jit
        def make(keys: Array) -> KeyValueRows:
            def part(key: Array) -> KeyValueRows:
                shape = (2, step, self.kv_heads, self.head_dim)
                both = jax.random.normal(key, shape, jnp.bfloat16)
                return quantize_key_values(both[0], both[1], dtype)

            return jax.lax.map(part, keys).reshape(self.num_pages, PAGE)

        return jax.block_until_ready(make(jax.random.split(jax.random.key(3), tokens // step)))

    def bytes_per_token(self, cache: KeyValueRows) -> int:
        """See `Layer.bytes_per_token`."""
        return cache.bytes_per_token

    def queries(self) -> BFloat16[Array, "b one h width"]:
        """See `Layer.queries`."""
        shape = (self.b, 1, self.heads, self.head_dim)
        return jax.random.normal(jax.random.key(2), shape, jnp.bfloat16)

    def attend(self, cache: KeyValueRows, q: Array) -> Array:
        """See `Layer.attend`."""
        lengths = jnp.full(self.b, self.s_kv, jnp.int32)
        return self._attend(cache, q, self.order, lengths)

    def _attend(self, cache: KeyValueRows, q: Array, table: Array, lengths: Array) -> Array:
        out, _ = jmla.gqa_decode(
            q,
            cache,
            table,
            lengths,
            sm_scale=self.head_dim**-0.5,
            implementation=self.implementation,
        )
        return out

    def step(
        self, cache: KeyValueRows, params: dict[str, Array], x: Array, table: Array, lengths: Array
    ) -> tuple[Float[Array, "b hidden"], KeyValueRows]:
        """See `Layer.step`; queries and keys are normalised and rotated, as in the model."""
        gain = jnp.ones(self.head_dim, x.dtype)
        q, k, v = (jnp.einsum("th,hnd->tnd", x, params[name]) for name in ("q", "k", "v"))
        turn = functools.partial(
            apply_rope, positions=lengths - 1, rope=self.rope, interleaved=False
        )
        q, k = (turn(rms_norm(each, gain, 1e-6)) for each in (q, k))
        cache = cache.set(self.slots, quantize_key_values(k, v, cache.kv_cache_dtype))
        out = self._attend(cache, q[:, None], table, lengths)[:, 0]
        return jnp.einsum("tnd,ndh->th", out, params["out"]), cache


def _weights(key: Array, fan_in: int, shape: tuple[int, ...]) -> BFloat16[Array, "*shape"]:
    return (jax.random.normal(key, shape) * fan_in**-0.5).astype(jnp.bfloat16)


# A model by name: its layer for a batch and a length.
MODELS: Mapping[str, Callable[[int, int, Implementation | None], Layer]] = {
    "deepseek-r1": DeepSeekR1,
    "qwen3-235b": Qwen3,
}
