"""A peer of the cache kernels: plain Triton, one program per token.

That is how kernels that quantise or convert such a cache are often written; these were written for
this comparison, are no one's product, and are tuned no further than their number of warps.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cache_work import CACHE, MANY, Case, appended_slots, gathered_slots, latents
from benchmarks.modules import required
from benchmarks.timing import Call
from jmla.cache import Cache
from jmla.layouts import KVLayout, Rows, quantize, to_bytes

_INSTALL = "put PyTorch and Triton on the PYTHONPATH, or pass --no-peer"
NAME = "triton, one program per token"
ROW = 656


@dataclasses.dataclass(frozen=True)
class Peer:
    """What the peer does for a case.

    Attributes:
        calls: endless; each starts it.
        wait: for the device.
        result: of its calls, as PyTorch has it.
        torch: the module.
    """

    calls: Iterator[Call]
    wait: Callable[[object], object]
    result: Any
    torch: Any

    def error(self, ours: object) -> float | None:
        """The part of its bytes that are not those of our first call's result; runs its first."""
        if isinstance(ours, Cache):
            return None
        packed = to_bytes(ours) if isinstance(ours, Rows) else jnp.asarray(ours)
        theirs = _shared(self.torch, packed).view(self.torch.uint8)
        next(self.calls)()
        return float((theirs != self.result.view(self.torch.uint8)).float().mean())


def check() -> None:
    """Import what the peer needs, before anything is measured.

    Raises:
        ModuleNotFoundError: PyTorch or Triton is not installed.
    """
    required("torch", install=_INSTALL)
    required("triton", install=_INSTALL)


def prepare(case: Case) -> Peer | None:
    """The peer's inputs, the same as ours; None where there is none for the case."""
    if case.options or case.prompt or case.layout not in ("656", "576"):
        return None
    makers = {
        ("quantize", "656"): _quantize,
        ("dequantize", "656"): _dequantize,
        ("requantize", "576"): _requantize,
        ("gather", "656"): _gather,
        ("append", "656"): _append,
    }
    maker = makers.get((case.op, case.layout))
    if maker is None:
        return None
    torch = required("torch", install=_INSTALL)
    kernels = required("benchmarks.cache_triton", install=_INSTALL)
    return maker(case.n, torch, kernels)


def _shared(torch: Any, array: jax.Array) -> Any:
    """The memory of a JAX array, as PyTorch sees it."""
    return torch.from_dlpack(jax.block_until_ready(array))


def _packed(torch: Any, n: int) -> Any:
    rows = quantize(latents(n, 576), KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE)
    return _shared(torch, to_bytes(rows))


def _peer(torch: Any, call: Call, result: Any) -> Peer:
    return Peer(itertools.repeat(call), lambda _: torch.cuda.synchronize(), result, torch)


def _quantize(n: int, torch: Any, kernels: Any) -> Peer:
    x, out = (
        _shared(torch, latents(n, 576)),
        torch.empty((n, ROW), dtype=torch.uint8, device="cuda"),
    )
    return _peer(torch, lambda: kernels.quantize[(n,)](x, out, out, False, num_warps=1), out)


def _dequantize(n: int, torch: Any, kernels: Any) -> Peer:
    rows, out = _packed(torch, n), torch.empty((n, 576), dtype=torch.bfloat16, device="cuda")
    return _peer(torch, lambda: kernels.dequantize[(n,)](rows, out, rows, False, num_warps=1), out)


def _requantize(n: int, torch: Any, kernels: Any) -> Peer:
    codes = _shared(torch, to_bytes(quantize(latents(n, 576), KVLayout.FP8_NOPE_FP8_ROPE)))
    out = torch.empty((n, ROW), dtype=torch.uint8, device="cuda")
    return _peer(torch, lambda: kernels.requantize[(n,)](codes, out, num_warps=1), out)


def _gather(n: int, torch: Any, kernels: Any) -> Peer:
    rows, out = _packed(torch, MANY), torch.empty((n, 576), dtype=torch.bfloat16, device="cuda")
    lists = [_shared(torch, slots) for slots in gathered_slots(n, MANY)]
    calls = [
        lambda slots=slots: kernels.dequantize[(n,)](rows, out, slots, True, num_warps=1)
        for slots in lists
    ]
    return Peer(itertools.cycle(calls), lambda _: torch.cuda.synchronize(), out, torch)


def _append(n: int, torch: Any, kernels: Any) -> Peer:
    x, keys = _shared(torch, latents(n, 576)), _shared(torch, latents(n, 128))
    rows = torch.zeros((CACHE, ROW), dtype=torch.uint8, device="cuda")
    index = torch.zeros((CACHE, 132), dtype=torch.uint8, device="cuda")
    pages = CACHE // 64
    lists = [_shared(torch, appended_slots(i, n, pages, prompt=False)) for i in range(4)]

    def call(slots: Any) -> None:
        kernels.quantize[(n,)](x, rows, slots, True, num_warps=1)
        kernels.quantize_keys[(n,)](keys, index, slots, num_warps=1)

    calls = [lambda slots=slots: call(slots) for slots in lists]
    return Peer(itertools.cycle(calls), lambda _: torch.cuda.synchronize(), rows, torch)
