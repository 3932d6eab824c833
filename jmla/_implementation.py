"""Which implementation of an op serves a call: decided from its shapes, and explained."""

from collections.abc import Sequence

from jmla.platforms import HOPPER, detect_platform


def choose(implementation: str | None, reasons: Sequence[str], others: tuple[str, ...]) -> str:
    """The implementation to run.

    Args:
        implementation: what was asked for; None for the best one that serves the call.
        reasons: what keeps the kernel from serving the call.
        others: the implementations that serve every call, the fastest first.

    Raises:
        NotImplementedError: the kernel was asked for and cannot serve the call.
        ValueError: no implementation has that name.
    """
    if implementation is None:
        return "mosaic_gpu" if not reasons and on_hopper() else others[0]
    if implementation in others:
        return implementation
    if implementation != "mosaic_gpu":
        known = ", ".join(repr(name) for name in ("mosaic_gpu", *others))
        raise ValueError(f"{implementation=}: expected {known}, or None for the best one")
    if reasons:
        raise NotImplementedError(
            f"{implementation=} cannot serve this call: {'; '.join(reasons)}. Pass "
            "implementation=None for the best one that can"
        )
    return implementation


def on_hopper() -> bool:
    """Whether JAX's default device is what the kernels are made for."""
    return detect_platform() == HOPPER
