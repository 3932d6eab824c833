"""What this GPU can do at best: copy, bf16 matrix products, reading random rows of a cache."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from benchmarks.modules import optional
from benchmarks.timing import Call, Timer

LOAD_BYTES = 16  # of one lane's widest load

_READ_ROWS = r"""
extern "C" __global__ void read_rows(const char* __restrict__ rows, const int* __restrict__ slots,
                                     int n, int row_bytes, int* out) {
  // A warp reads UNROLL rows at a time, its lanes side by side: 16 bytes each.
  const int UNROLL = 4;
  int warp = (blockIdx.x * blockDim.x + threadIdx.x) >> 5, lane = threadIdx.x & 31;
  int warps = (gridDim.x * blockDim.x) >> 5, chunks = row_bytes >> 4, acc = 0;
  for (int i = warp * UNROLL; i < n; i += warps * UNROLL) {
    int slot[UNROLL];
    #pragma unroll
    for (int u = 0; u < UNROLL; u++) slot[u] = i + u < n ? slots[i + u] : slots[i];
    for (int c = lane; c < chunks; c += 32) {
      int4 v[UNROLL];
      #pragma unroll
      for (int u = 0; u < UNROLL; u++)
        v[u] = __ldg((const int4*)(rows + (size_t)slot[u] * row_bytes) + c);
      #pragma unroll
      for (int u = 0; u < UNROLL; u++) acc ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
  }
  if (acc == 0x12345678) out[0] = acc;  // never: the rows do not fold to it, but nvcc cannot know
}
"""
# (blocks per multiprocessor, threads of a block): the best of them is the floor.
_GRIDS = ((2, 512), (4, 256), (4, 512), (8, 256), (2, 1024))


class Ceilings(NamedTuple):
    """Measured rates.

    Attributes:
        copy_gbps: bytes read and written.
        matmul_tflops: bf16, with f32 sums.
    """

    copy_gbps: float
    matmul_tflops: float


def measure_ceilings(timer: Timer, *, copy_bytes: int, matmul_size: int) -> Ceilings:
    """Time a copy of `copy_bytes` and a product of square matrices of `matmul_size`."""
    words = jnp.arange(copy_bytes // 4, dtype=jnp.uint32)
    # A kernel and not a copy engine's work: the values change.
    copy = functools.partial(jax.jit(lambda x: x ^ jnp.uint32(1)), words)
    copy_us = timer.measure(itertools.repeat(copy), jax.block_until_ready, what="copy")

    # Random numbers: a product of zeros draws less power and runs at higher clocks.
    shape = (matmul_size, matmul_size)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    matmul = functools.partial(jax.jit(jnp.dot), a, b)
    matmul_us = timer.measure(itertools.repeat(matmul), jax.block_until_ready, what="matmul")
    return Ceilings(
        copy_gbps=2 * words.nbytes / copy_us / 1e3,
        matmul_tflops=2 * matmul_size**3 / matmul_us / 1e6,
    )


def floor_us(gather_us: float, flops: int, ceilings: Ceilings) -> float:
    """The slower of reading the rows and of the arithmetic, as if each ran beside the other."""
    return max(gather_us, flops / ceilings.matmul_tflops / 1e6)


@dataclasses.dataclass(frozen=True)
class Gather:
    """Reads random rows and does nothing else.

    Attributes:
        by: what reads them: "cuda", a kernel written for it, or "xla", a gather and a sum, which
            is no floor where XLA's kernel is slow.
        slots: rows of the pool.
        row_bytes: bytes of a row.
    """

    by: str
    slots: int
    row_bytes: int

    @classmethod
    def for_rows(cls, slots: int, row_bytes: int) -> "Gather":
        """The best that this machine has.

        Args:
            slots: rows of the pool.
            row_bytes: of a packed row. Only its whole 16-byte pieces are read, and rows lie that
                far apart: for rows that are no multiple (324, 584) the floor is up to 1.4 % lower
                than it could be.
        """
        has_cuda = jax.default_backend() == "gpu" and optional("cupy") is not None
        pieces = row_bytes // LOAD_BYTES
        return cls("cuda" if has_cuda else "xla", slots, pieces * LOAD_BYTES)

    def measure(self, timer: Timer, indices: Sequence[Int[Array, "..."]]) -> float:
        """Microseconds to read the rows that one of `indices` names; they rotate."""
        what = f"gather of {indices[0].size} rows of {self.row_bytes} bytes"
        if self.by == "xla":
            return self._measure_xla(timer, indices, what)
        return self._measure_cuda(timer, indices, what)

    def _measure_xla(self, timer: Timer, indices: Sequence[Int[Array, "..."]], what: str) -> float:
        words = self.row_bytes // 4
        pool = jnp.arange(self.slots * words, dtype=jnp.uint32).reshape(self.slots, words)
        read: Callable[..., Array] = jax.jit(
            lambda pool, slots: jnp.sum(pool.at[slots].get(mode="clip"), dtype=jnp.uint32)
        )
        calls = itertools.cycle([functools.partial(read, pool, slots) for slots in indices])
        return timer.measure(calls, jax.block_until_ready, what=what)

    def _measure_cuda(self, timer: Timer, indices: Sequence[Int[Array, "..."]], what: str) -> float:
        cupy: Any = optional("cupy")
        pool = cupy.arange(self.slots * self.row_bytes // 8, dtype=cupy.int64)
        slots = [cupy.asarray(np.asarray(each).ravel()) for each in indices]
        out = cupy.zeros(1, cupy.int32)
        kernel = cupy.RawKernel(_READ_ROWS, "read_rows")
        sizes = (np.int32(slots[0].size), np.int32(self.row_bytes))
        multiprocessors = cupy.cuda.Device().attributes["MultiProcessorCount"]
        rotation = itertools.cycle(slots)
        wait = functools.partial(_synchronize, cupy)
        times = []
        for blocks, threads in _GRIDS:
            grid = ((blocks * multiprocessors,), (threads,))
            # One rotation for all grids: its first sets may still be in the cache.
            calls = map(
                functools.partial(_launch, kernel, grid, pool),
                rotation,
                itertools.repeat((*sizes, out)),
            )
            times.append(timer.measure(calls, wait, what=what))
        del pool, slots
        cupy.get_default_memory_pool().free_all_blocks()
        return min(times)


def _launch(kernel: Any, grid: Any, pool: Any, slots: Any, rest: Any) -> Call:
    return functools.partial(kernel, *grid, (pool, slots, *rest))


def _synchronize(cupy: Any, _: object) -> None:
    cupy.cuda.Device().synchronize()
