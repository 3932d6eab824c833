"""Compile for an H200 with no GPU in the machine: XLA's CUDA plugin and a target description."""

import functools
from typing import Any

import jax
import pytest
from jax.experimental import topologies

from tests.helpers import DATA


@functools.cache
def sharding() -> jax.sharding.NamedSharding:
    """Everything on the one device of a described H200; skips where that cannot be had."""
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax-cuda13-plugin (make test-oldest)")
    if jax.default_backend() != "cpu":
        pytest.skip("this machine compiles for its own accelerator in every other test")
    described = topologies.get_topology_desc(
        platform="cuda",
        target_config=(DATA / "h200_target_config.txt").read_text(),
        topology="1x1x1",
    )
    mesh = topologies.make_mesh(described, (1,), ("device",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def on_h200(tree: Any) -> Any:
    """The shapes of `tree` as arguments that live on that device."""
    where = sharding()
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree
    )


def bytes_of(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Temporary bytes of a program, and bytes of arguments that its results reuse."""
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes, analysis.alias_size_in_bytes
