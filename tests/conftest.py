"""Strict numerics for every test, two CPU devices for sharding, and one hypothesis profile."""

import os

# Read when the CPU backend starts, so before the first jax import.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)
# Several test processes share one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("jmla", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("jmla")


@pytest.fixture
def gpu() -> jax.Device:
    """The first GPU; a test that asks for it is skipped on a machine without one."""
    if jax.default_backend() != "gpu":
        pytest.skip("needs a GPU; JAX's default backend here is " + jax.default_backend())
    return jax.devices("gpu")[0]


@pytest.fixture
def hopper(gpu: jax.Device) -> jax.Device:
    """The first GPU; a test that asks for it is skipped unless that is a Hopper."""
    capability = getattr(gpu, "compute_capability", None)
    if capability != "9.0":
        pytest.skip(f"needs a GPU of compute capability 9.0 (Hopper); this one has {capability}")
    return gpu
