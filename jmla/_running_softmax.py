"""A softmax that is computed over some keys at a time."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class RunningSoftmax(NamedTuple):
    """A softmax over some keys, not yet divided by its sum of weights.

    Attributes:
        out: the sum of the values, each by its weight.
        top: the largest logit, which weights are relative to; -inf over no keys.
        total: the sum of the weights.
    """

    out: Float[Array, "*rows width"]
    top: Float[Array, "*rows"]
    total: Float[Array, "*rows"]

    def joined_with(self, other: "RunningSoftmax") -> "RunningSoftmax":
        """The softmax over the keys of both; joining an empty one changes no bit."""
        top = jnp.maximum(self.top, other.top)
        mine, others = (jnp.exp(x.top - finite_top(top)) for x in (self, other))
        return RunningSoftmax(
            self.out * mine[..., None] + other.out * others[..., None],
            top,
            self.total * mine + other.total * others,
        )


def finite_top(top: Float[Array, "*rows"]) -> Float[Array, "*rows"]:
    """`top`, or 0 where nothing was attended to and subtracting -inf would give NaN."""
    return jnp.where(jnp.isneginf(top), 0.0, top)
