"""A resolved config of attention over keys and values of several heads."""

import dataclasses
from typing import cast

import jax
from jaxtyping import Array, BFloat16, Float, Int

from jmla.attention import Implementation
from jmla.config import GQAConfig
from jmla.gqa import gqa_decode
from jmla.layouts.key_values import KeyValueRows, zero_key_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQAPlan:
    """What `jmla.resolve` makes of a `GQAConfig`. Hashable; `str(plan)` explains every choice.

    Attributes:
        config: the config, as it was given.
        platform: the platform it was resolved for, never "auto".
        kv_cache_dtype: how the cache is stored, never "auto".
        backend: the contract of the decode.
        reasons: why they were taken, and what runs the decode; left out of comparisons.
    """

    config: GQAConfig
    platform: str
    kv_cache_dtype: str
    backend: str
    reasons: tuple[str, ...] = dataclasses.field(compare=False)

    def init_cache(
        self,
        num_pages: int,
        *,
        key_scale: Array | float | None = None,
        value_scale: Array | float | None = None,
    ) -> KeyValueRows:
        """An empty cache of one layer, of token shape (num_pages, page_size).

        Args:
            num_pages: number of pages.
            key_scale: the scale of all keys of an "fp8_e4m3" cache; None is exactly 1.
            value_scale: likewise, of all values.
        """
        return zero_key_values(
            self.kv_cache_dtype,
            (num_pages, self.config.page_size),
            kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            key_scale=key_scale,
            value_scale=value_scale,
        )

    def decode(
        self,
        q: BFloat16[Array, "b s_q h dim"],
        cache: KeyValueRows,
        page_table: Int[Array, "b max_pages"],
        seq_lens: Int[Array, " b"],
    ) -> tuple[BFloat16[Array, "b s_q h dim"], Float[Array, "b s_q h"]]:
        """Attention of each request's last `s_q` tokens to its whole context.

        Args:
            q: bf16 [b, s_q, h, head_dim], the queries at the last `s_q` positions of each request.
            cache: with the new tokens stored.
            page_table: int32 [b, max_pages]; see `jmla.gqa_decode`.
            seq_lens: int32 [b], the new tokens included; 0 for an idle row.

        Returns:
            out, bf16 [b, s_q, h, head_dim], and lse, f32 [b, s_q, h].

        Raises:
            ValueError: an argument does not fit the plan or the others.
            NotImplementedError: the named implementation cannot serve the call.
        """
        config = self.config
        got = (cache.kv_cache_dtype, *cache.shape[1:], cache.kv_heads, cache.head_dim)
        planned = (self.kv_cache_dtype, config.page_size, config.num_kv_heads, config.head_dim)
        if got != planned:
            raise ValueError(
                f"cache has (kv_cache_dtype, page_size, kv_heads, head_dim) {got}: expected "
                f"{planned}; make it with plan.init_cache"
            )
        if q.ndim != 4 or q.shape[2] != config.num_heads:
            raise ValueError(
                f"{q.shape=}: expected [b, s_q, {config.num_heads}, {config.head_dim}] for a plan "
                f"of {config.num_heads} heads on one device"
            )
        return _decode(self, q, cache, page_table, seq_lens)

    def __str__(self) -> str:
        return "\n".join(self.reasons)


@jax.jit(static_argnums=0)
def _decode(
    plan: GQAPlan, q: Array, cache: KeyValueRows, page_table: Array, seq_lens: Array
) -> tuple[Array, Array]:
    return gqa_decode(
        q,
        cache,
        page_table,
        seq_lens,
        sm_scale=plan.config.sm_scale,
        num_splits=plan.config.num_splits,
        implementation=cast(Implementation | None, plan.config.implementation),
    )
