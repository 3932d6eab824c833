"""DeepGEMM's index logits, and SGLang's selection behind them, over the same arrays as ours."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.modules import required
from benchmarks.timing import Call

_INSTALL = (
    "put PyTorch, sgl-deep-gemm and apache-tvm-ffi on the PYTHONPATH and CUDA's compiler in "
    "CUDA_HOME, or pass --no-peer"
)
_LIBRARY = "SGLANG_OPS"
_PAGE = 64
_ITEM = 132  # bytes of a key and its scale


@dataclasses.dataclass(frozen=True)
class DeepGEMM:
    """The peer.

    Attributes:
        torch: the module.
        deep_gemm: the module.
        multiprocessors: of this GPU.
    """

    torch: Any
    deep_gemm: Any
    multiprocessors: int

    name = "deep_gemm"

    @classmethod
    def load(cls) -> "DeepGEMM":
        """The peer from its package.

        Raises:
            ModuleNotFoundError: PyTorch or the package is not there.
        """
        torch = required("torch", install=_INSTALL)
        deep_gemm = required("deep_gemm", install=_INSTALL)
        count = torch.cuda.get_device_properties(0).multi_processor_count
        return cls(torch, deep_gemm, count)

    @property
    def selects(self) -> bool:
        """Whether SGLang's selection is there too."""
        return Path(os.environ.get(_LIBRARY, "")).is_file()

    def paged_call(
        self, q: Array, weights: Array, packed: Array, page_table: Array, lengths: Array
    ) -> Call:
        """Logits of pages of 8448 bytes.

        Args:
            q: e4m3 [b, s_q, heads, 128].
            weights: f32 [b, s_q, heads].
            packed: u8 [pages, 8448].
            page_table: int32 [b, max_pages].
            lengths: int32 [b, s_q].
        """
        queries, head_weights, table, lens = self._tensors(q, weights, page_table, lengths)
        cache = self._tensors(packed)[0].view(-1, _PAGE, 1, _ITEM)
        heads, columns = q.shape[2], _PAGE * page_table.shape[1]
        head_weights = head_weights.view(-1, heads)
        # Made once per step and used by all layers.
        plan = self.deep_gemm.get_paged_mqa_logits_metadata(lens, _PAGE, self.multiprocessors)

        def run() -> Any:
            return self.deep_gemm.fp8_paged_mqa_logits(
                queries, cache, head_weights, lens, table, plan, columns, False
            )

        return run

    def selecting_call(
        self,
        q: Array,
        weights: Array,
        packed: Array,
        page_table: Array,
        lengths: Array,
        *,
        k: int,
    ) -> Call:
        """The logits of one query for each request, and the slots of its k largest."""
        self.torch.ops.load_library(os.environ[_LIBRARY])
        logits = self.paged_call(q, weights, packed, page_table, lengths)
        slots = page_table[:, :, None] * _PAGE + jnp.arange(_PAGE, dtype=jnp.int32)
        slots, lens = self._tensors(slots.reshape(page_table.shape[0], -1), lengths.reshape(-1))
        first = self.torch.arange(q.shape[0] + 1, dtype=self.torch.int32, device=slots.device)
        out = self.torch.empty(q.shape[0], k, dtype=self.torch.int32, device=slots.device)

        def run() -> Any:
            self.torch.ops.sgl_kernel.fast_topk_transform_fused(
                logits(), lens, out, slots, first, None
            )
            return out

        return run

    def ragged_call(
        self, q: Array, weights: Array, keys: Array, scales: Array, starts: Array, ends: Array
    ) -> Call:
        """Logits of keys that lie back to back.

        Args:
            q: e4m3 [t, heads, 128].
            weights: f32 [t, heads].
            keys: e4m3 [s, 128].
            scales: f32 [s].
            starts: int32 [t].
            ends: int32 [t].
        """
        given = self._tensors(q, keys, scales, weights, starts, ends)
        queries, values, factors, head_weights, first, last = given

        def run() -> Any:
            return self.deep_gemm.fp8_mqa_logits(
                queries, (values, factors), head_weights, first, last, False
            )

        return run

    def results(self, returned: Any) -> np.ndarray:
        """What a call returned."""
        return returned.cpu().numpy()

    def wait(self, _: object) -> None:
        """Until all its work is done."""
        self.torch.cuda.synchronize()

    def _tensors(self, *arrays: Array) -> list[Any]:
        tensors = []
        for array in jax.block_until_ready(arrays):
            if array.dtype == jnp.float8_e4m3fn:
                codes = jax.block_until_ready(jax.lax.bitcast_convert_type(array, jnp.uint8))
                tensors.append(self.torch.from_dlpack(codes).view(self.torch.float8_e4m3fn))
            else:
                tensors.append(self.torch.from_dlpack(array))
        return tensors
