"""Sparse prefill through XLA: the loop of `jmla._xla_attention`, and its derivatives.

What the loop gathered and weighed in one step is computed anew for derivatives, so that their
memory, too, depends on neither the number of queries nor the length of their lists.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float

from jmla._xla_attention import CPU_PREFILL_ROWS_PER_STEP, KeyLists, attend, widest_step
from jmla.layouts.bf16 import BF16Rows


def prefill(
    q: BFloat16[Array, "n h width"],
    keys: KeyLists,
    *,
    sm_scale: float | Float[Array, ""],
    attn_sink: Float[Array, " h"] | None,
) -> tuple[BFloat16[Array, "n h value"], Float[Array, "n h"], Float[Array, "n h"]]:
    """out, max_logits and lse of the tokens of prompts, each with a `slot_list` of its own.

    Derivatives with respect to bf16 rows are sums over all queries that name a row, in f32.
    """
    return _prefill(q, keys, jnp.asarray(sm_scale, jnp.float32), attn_sink)


@jax.custom_jvp
def _prefill(
    q: BFloat16[Array, "n h width"],
    keys: KeyLists,
    sm_scale: Float[Array, ""],
    attn_sink: Float[Array, " h"] | None,
) -> tuple[BFloat16[Array, "n h value"], Float[Array, "n h"], Float[Array, "n h"]]:
    results = attend(
        q[:, None],
        [keys],
        page_sizes=(1,),
        sm_scale=sm_scale,
        attn_sink=attn_sink,
        rows_per_step=widest_step(keys.pages.shape[-1]),
        cpu_rows_per_step=CPU_PREFILL_ROWS_PER_STEP,
        num_splits=1,
    )
    out, max_logits, lse = (x[:, 0] for x in results)
    return out, max_logits, lse


@_prefill.defjvp
def _prefill_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    def wide(q: Array, keys: KeyLists, *rest: Any) -> Any:
        rows = keys.rows.flat()
        if isinstance(rows, BF16Rows):
            latents = rows.latents.astype(jnp.float32)
            rows = _WideRows(latents, rank=rows.rank, rope_dim=rows.rope_dim)
        return _prefill.fun(q, keys._replace(rows=rows), *rest)

    return jax.jvp(wide, primals, tangents)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _WideRows(BF16Rows):
    """bf16 rows in f32, so that what a derivative adds up is in f32, too."""

    def dequantize(self) -> BFloat16[Array, "*tokens width"]:
        return self.latents.astype(jnp.bfloat16)
