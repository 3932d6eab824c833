"""Peers of the cache kernels: an engine's Triton kernels, and plain ones of one program per token.

`SGLANG_TRITON` names a folder with files of SGLang, as they are: `dsa_quant_k_cache.py` and
`dequant_k_cache.py` (of `attention/dsa`) of its release 0.5.23, and `requant_k_cache.py` of its
pull request 21011. What they do is timed by them. Elsewhere the peer is plain Triton, one program
per token: that is how kernels that quantise or convert such a cache are often written; these were
written for this comparison, are no one's product, and are tuned no further than their number of
warps.
"""

import dataclasses
import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cache_work import CACHE, MANY, Case, appended_slots, gathered_slots, latents
from benchmarks.modules import required
from benchmarks.timing import Call
from jmla.cache import Cache
from jmla.layouts import KVLayout, Rows, quantize, to_bytes

_INSTALL = "put PyTorch and Triton on the PYTHONPATH, or pass --no-peer"
_FOLDER = "SGLANG_TRITON"
PLAIN = "triton, one program per token"
SGLANG = "sglang"
ROW = 656


@dataclasses.dataclass(frozen=True)
class Peer:
    """What the peer does for a case.

    Attributes:
        name: of the peer.
        calls: endless; each starts it and returns its result.
        torch: the module.
    """

    name: str
    calls: Iterator[Call]
    torch: Any

    def wait(self, _: object) -> None:
        """For the device."""
        self.torch.cuda.synchronize()

    def error(self, ours: object) -> float | None:
        """The part of its bytes that are not those of our first call's result; runs its first."""
        if isinstance(ours, Cache):
            return None
        packed = to_bytes(ours) if isinstance(ours, Rows) else jnp.asarray(ours)
        expected = _shared(self.torch, packed).view(self.torch.uint8).flatten()
        theirs: Any = next(self.calls)()
        return float((expected != theirs.view(self.torch.uint8).flatten()).float().mean())


def check() -> None:
    """Import what the peer needs, before anything is measured.

    Raises:
        ModuleNotFoundError: PyTorch or Triton is not installed.
    """
    required("torch", install=_INSTALL)
    required("triton", install=_INSTALL)


def prepare(case: Case) -> Peer | None:
    """The peer's inputs, the same as ours; None where there is none for the case.

    Raises:
        FileNotFoundError: `SGLANG_TRITON` names no folder.
    """
    key = (case.op, case.layout)
    if case.prompt:
        return None
    torch = required("torch", install=_INSTALL)
    file, engine = _ENGINE.get((*key, case.options), (None, None))
    kernels = None if file is None else _engine_file(file)
    if engine is not None and kernels is not None:
        return Peer(SGLANG, engine(case.n, torch, kernels), torch)
    plain = None if case.options else _PLAIN.get(key)
    if plain is None:
        return None
    kernels = required("benchmarks.cache_triton", install=_INSTALL)
    return Peer(PLAIN, plain(case.n, torch, kernels), torch)


@functools.cache
def _engine_file(name: str) -> ModuleType | None:
    """A file of the engine as a module; None if there is none.

    It is read by its place, because importing the engine as a package starts a server's worth of
    others; these files need PyTorch and Triton alone.
    """
    if _FOLDER not in os.environ:
        return None
    folder = Path(os.environ[_FOLDER])
    if not folder.is_dir():
        raise FileNotFoundError(f"{_FOLDER}={str(folder)!r} is no folder; unset it, or name one")
    if not (folder / name).exists():
        return None
    spec = importlib.util.spec_from_file_location(name.removesuffix(".py"), folder / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shared(torch: Any, array: jax.Array) -> Any:
    """The memory of a JAX array, as PyTorch sees it."""
    return torch.from_dlpack(jax.block_until_ready(array))


def _packed(torch: Any, n: int) -> Any:
    rows = quantize(latents(n, 576), KVLayout.FP8_NOPE_WITH_BLOCK_SCALE_BF16_ROPE)
    return _shared(torch, to_bytes(rows))


def _plain_fp8(torch: Any, n: int) -> Any:
    return _shared(torch, to_bytes(quantize(latents(n, 576), KVLayout.FP8_NOPE_FP8_ROPE)))


def _each(launch: Callable[..., object], out: Any, *arguments: Any) -> Iterator[Call]:
    """Calls that launch with one argument after the other (or with none) and return `out`."""

    def call(*argument: Any) -> Any:
        launch(*argument)
        return out

    return itertools.cycle([functools.partial(call, a) for a in arguments] or [call])


def _quantize(n: int, torch: Any, kernels: Any) -> Iterator[Call]:
    x, out = (
        _shared(torch, latents(n, 576)),
        torch.empty((n, ROW), dtype=torch.uint8, device="cuda"),
    )
    return _each(lambda: kernels.quantize[(n,)](x, out, out, False, num_warps=1), out)


def _dequantize(n: int, torch: Any, kernels: Any) -> Iterator[Call]:
    rows, out = _packed(torch, n), torch.empty((n, 576), dtype=torch.bfloat16, device="cuda")
    return _each(lambda: kernels.dequantize[(n,)](rows, out, rows, False, num_warps=1), out)


def _requantize(n: int, torch: Any, kernels: Any) -> Iterator[Call]:
    codes = _plain_fp8(torch, n)
    out = torch.empty((n, ROW), dtype=torch.uint8, device="cuda")
    return _each(lambda: kernels.requantize[(n,)](codes, out, num_warps=1), out)


def _gather(n: int, torch: Any, kernels: Any) -> Iterator[Call]:
    rows, out = _packed(torch, MANY), torch.empty((n, 576), dtype=torch.bfloat16, device="cuda")

    def launch(slots: Any) -> None:
        kernels.dequantize[(n,)](rows, out, slots, True, num_warps=1)

    return _each(launch, out, *(_shared(torch, slots) for slots in gathered_slots(n, MANY)))


def _append(n: int, torch: Any, kernels: Any) -> Iterator[Call]:
    x, keys = _shared(torch, latents(n, 576)), _shared(torch, latents(n, 128))
    rows = torch.zeros((CACHE, ROW), dtype=torch.uint8, device="cuda")
    index = torch.zeros((CACHE, 132), dtype=torch.uint8, device="cuda")
    pages = CACHE // 64

    def launch(slots: Any) -> None:
        kernels.quantize[(n,)](x, rows, slots, True, num_warps=1)
        kernels.quantize_keys[(n,)](keys, index, slots, num_warps=1)

    lists = [_shared(torch, appended_slots(i, n, pages, prompt=False)) for i in range(4)]
    return _each(launch, rows, *lists)


def _engine_quantize(n: int, torch: Any, kernels: Any) -> Iterator[Call]:
    x = _shared(torch, latents(n, 576)).view(n, 1, 1, 576)
    return itertools.repeat(lambda: kernels.quantize_k_cache(x))


def _engine_dequantize(n: int, torch: Any, kernels: Any) -> Iterator[Call]:
    rows = _packed(torch, n).view(torch.float8_e4m3fn).view(n, 1, 1, ROW)
    return itertools.repeat(lambda: kernels.dequantize_k_cache(rows))


def _engine_requantize(n: int, torch: Any, kernels: Any) -> Iterator[Call]:
    codes = _plain_fp8(torch, n).view(torch.float8_e4m3fn).view(n, 1, 1, 576)
    return itertools.repeat(lambda: kernels.requantize_fp8_to_block_scale(codes))


def _engine_gather(n: int, torch: Any, kernels: Any) -> Iterator[Call]:
    rows = _packed(torch, MANY).view(torch.float8_e4m3fn).view(MANY, 1, ROW)
    lists = [_shared(torch, slots) for slots in gathered_slots(n, MANY)]
    return itertools.cycle(
        [functools.partial(kernels.dequantize_k_cache_paged_dsa, rows, slots) for slots in lists]
    )


_PLAIN = {
    ("quantize", "656"): _quantize,
    ("dequantize", "656"): _dequantize,
    ("requantize", "576"): _requantize,
    ("gather", "656"): _gather,
    ("append", "656"): _append,
}
# SGLang's scales are amax / 448 as they come.
_ENGINE = {
    ("quantize", "656", (("scale_format", "fp32"),)): ("dsa_quant_k_cache.py", _engine_quantize),
    ("dequantize", "656", ()): ("dequant_k_cache.py", _engine_dequantize),
    ("requantize", "576", ()): ("requant_k_cache.py", _engine_requantize),
    ("gather", "656", ()): ("dequant_k_cache.py", _engine_gather),
}
