"""What JAX runs on, by the names that configs use: NVIDIA architectures, "cpu", "rocm", "tpu"."""

import jax

HOPPER = "sm_90"
"""What the kernels are made for."""


def detect_platform() -> str:
    """The platform of JAX's default device: "sm_90" and the like, "cpu", "rocm" or "tpu"."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    capability = str(getattr(device, "compute_capability", ""))
    major, dot, minor = capability.partition(".")
    return f"sm_{major}{minor}" if dot else "rocm"


def is_cuda(platform: str) -> bool:
    """Whether the platform is an NVIDIA GPU."""
    return platform.startswith("sm_")


def is_blackwell(platform: str) -> bool:
    """Whether the platform is an NVIDIA GPU of compute capability 10.0 or later."""
    return is_cuda(platform) and int(platform.removeprefix("sm_")) >= 100


def describe_platform(platform: str) -> str:
    """The platform with the family's name, if it has one."""
    if is_blackwell(platform):
        return f"{platform} (Blackwell)"
    return f"{HOPPER} (Hopper)" if platform == HOPPER else platform
