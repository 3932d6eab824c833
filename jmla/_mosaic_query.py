"""Index queries through the Hopper kernel of `pallas_kernels`: which calls it serves, and the call.

`pallas_kernels` is imported by the call and not by this module: importing Pallas takes as long as
importing the rest of jmla.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn, Float32

DIMS = (64, 128)
ROPE_DIMS = (16, 32, 64, 128)


class Rotation(NamedTuple):
    """Cosines and sines of the rotary pairs, f32 [tokens, pairs]."""

    cos: Float32[Array, "tokens pairs"]
    sin: Float32[Array, "tokens pairs"]


class Format(NamedTuple):
    """What is static of a call, as the arguments of `jmla.prepare_index_query` are called."""

    interleaved: bool
    hadamard: bool
    scale_format: str


def unsupported_reasons(q: Array, rotation: Rotation | None) -> list[str]:
    """Why the kernel cannot prepare those queries; empty if it can."""
    reasons = []
    if q.shape[-1] not in DIMS:
        reasons.append(f"{q.shape=}: the mosaic_gpu kernel takes heads of {DIMS} values")
    rope_dim = 2 * rotation.cos.shape[-1] if rotation is not None else ROPE_DIMS[0]
    if rope_dim not in ROPE_DIMS:
        reasons.append(f"{rope_dim=}: the mosaic_gpu kernel rotates one of {ROPE_DIMS} values")
    if 0 in q.shape:
        reasons.append(f"{q.shape=}: the mosaic_gpu kernel expects at least one head")
    return reasons


def prepare(
    q: Float[Array, "tokens heads dim"],
    weights: Float[Array, "tokens heads"],
    rotation: Rotation | None,
    format_: Format,
) -> tuple[Float8e4m3fn[Array, "tokens heads dim"], Float32[Array, "tokens heads"]]:
    """`jmla.prepare_index_query` of arguments that `unsupported_reasons` has nothing against.

    vmap runs the kernel once for each entry.
    """
    return _compiled(q, weights, rotation, format_)


def _mapped(q: Array, weights: Array, rotation: Rotation | None, format_: Format) -> tuple:
    # What is chosen by the result has no derivatives, and the kernel has no rule for any.
    q, weights, rotation = jax.lax.stop_gradient((q, weights, rotation))
    launch = functools.partial(_launch, format_)
    return jax.custom_batching.sequential_vmap(launch)(q, weights, rotation)


# Compiled at the level of the module: a call outside jit would compile the kernel every time.
_compiled = jax.jit(_mapped, static_argnums=3)


def _launch(
    format_: Format, q: Array, weights: Array, rotation: Rotation | None
) -> tuple[Array, Array]:
    from pallas_kernels import index_query as kernels

    tokens, heads, dim = q.shape
    operands = {"q": q, "weights": weights.astype(jnp.float32)}
    if rotation is not None:
        operands |= {"cos": rotation.cos, "sin": rotation.sin}
    shape = kernels.Shape(
        tokens=tokens,
        heads=heads,
        dim=dim,
        rope_dim=0 if rotation is None else 2 * rotation.cos.shape[-1],
        interleaved=format_.interleaved,
        hadamard=format_.hadamard,
        pow2=format_.scale_format == "pow2",
        f32=q.dtype == jnp.float32,
    )
    return kernels.index_query(shape, operands)
