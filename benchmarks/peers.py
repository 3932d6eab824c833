"""FlashMLA's decode and sparse prefill over the same cache, queries and indices as ours."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Int, UInt8

from benchmarks.modules import required
from benchmarks.timing import Call

HEADS = (64, 128)
"""The numbers of heads that FlashMLA has kernels for; others are padded with zeros."""

_INSTALL = "put PyTorch and sgl-flash-mla 1.0.0 on the PYTHONPATH, or pass --no-peer"


def check() -> None:
    """Import what the peer needs, before anything is measured.

    Raises:
        ModuleNotFoundError: PyTorch or FlashMLA is not installed.
    """
    # PyTorch first: FlashMLA's library links to it.
    required("torch", install=_INSTALL)
    required("flash_mla", install=_INSTALL)


@dataclasses.dataclass(frozen=True)
class FlashMLA:
    """The peer over one cache.

    Attributes:
        torch: the module.
        flash_mla: the module.
        cache: e4m3 [pages, page_size, 1, 656], the memory of the JAX array it was made of.
        sm_scale: factor on the logits.
    """

    torch: Any
    flash_mla: Any
    cache: Any
    sm_scale: float

    name = "flashmla"

    @classmethod
    def over(cls, packed: UInt8[Array, "pages page_size bytes"], *, sm_scale: float) -> "FlashMLA":
        """The peer over block-scale rows as bytes.

        Raises:
            ModuleNotFoundError: PyTorch or FlashMLA is not installed.
        """
        torch = required("torch", install=_INSTALL)
        flash_mla = required("flash_mla", install=_INSTALL)
        cache = torch.from_dlpack(jax.block_until_ready(packed))
        return cls(torch, flash_mla, cache.view(torch.float8_e4m3fn).unsqueeze(2), sm_scale)

    def metadata(self) -> Any:
        """What FlashMLA plans once per shape and keeps: its first call fills it."""
        return self.flash_mla.get_mla_metadata()[0]

    def call(
        self,
        q: BFloat16[Array, "b s_q h width"],
        indices: Int[Array, "b s_q topk"],
        metadata: Any,
    ) -> Call:
        """A call on these inputs; padding and conversion happen here and not in it."""
        heads = padded_heads(q.shape[2])
        padded = jnp.pad(q, ((0, 0), (0, 0), (0, heads - q.shape[2]), (0, 0)))
        padded, indices = jax.block_until_ready((padded, indices))
        queries, slots = self.torch.from_dlpack(padded), self.torch.from_dlpack(indices)

        def run() -> tuple[Any, Any]:
            return self.flash_mla.flash_mla_with_kvcache(
                queries,
                self.cache,
                None,
                None,
                512,
                metadata,
                None,
                self.sm_scale,
                False,
                True,
                slots,
                use_legacy=True,
            )

        return run

    def wait(self, _: object) -> None:
        """Until all its work is done."""
        self.torch.cuda.synchronize()

    def results(self, returned: Any, heads: int) -> tuple[np.ndarray, np.ndarray]:
        """f32 out [b, s_q, h, 512] and lse [b, s_q, h] of what a call returned."""
        out, lse = (part.float().cpu().numpy() for part in returned)
        return out[:, :, :heads], np.swapaxes(lse, 1, 2)[:, :, :heads]


@dataclasses.dataclass(frozen=True)
class FlashMLADense:
    """Its dense decode over pages of bf16.

    Attributes:
        torch: the module.
        flash_mla: the module.
        cache: bf16 [pages, page_size, 1, 576], the memory of the JAX array it was made of.
        sm_scale: factor on the logits.
    """

    torch: Any
    flash_mla: Any
    cache: Any
    sm_scale: float

    name = "flashmla"

    @classmethod
    def over(
        cls, latents: BFloat16[Array, "pages page_size width"], *, sm_scale: float
    ) -> "FlashMLADense":
        """The peer over a cache of pages.

        Raises:
            ModuleNotFoundError: PyTorch or FlashMLA is not installed.
        """
        torch = required("torch", install=_INSTALL)
        flash_mla = required("flash_mla", install=_INSTALL)
        cache = torch.from_dlpack(jax.block_until_ready(latents))
        return cls(torch, flash_mla, cache.unsqueeze(2), sm_scale)

    def metadata(self) -> Any:
        """What FlashMLA plans once per shape and lengths and keeps: its first call fills it."""
        return self.flash_mla.get_mla_metadata()[0]

    def call(
        self,
        q: BFloat16[Array, "b s_q h width"],
        table: Int[Array, "b max_pages"],
        seq_lens: Int[Array, " b"],
        metadata: Any,
    ) -> Call:
        """A causal call on these inputs; conversion happens here and not in it."""
        given = jax.block_until_ready((q, table, seq_lens))
        queries, pages, lengths = (self.torch.from_dlpack(each) for each in given)

        def run() -> tuple[Any, Any]:
            return self.flash_mla.flash_mla_with_kvcache(
                queries,
                self.cache,
                pages,
                lengths,
                512,
                metadata,
                None,
                self.sm_scale,
                True,
                False,
                use_legacy=True,
            )

        return run

    def wait(self, _: object) -> None:
        """Until all its work is done."""
        self.torch.cuda.synchronize()

    def results(self, returned: Any) -> tuple[np.ndarray, np.ndarray]:
        """f32 out [b, s_q, h, 512] and lse [b, s_q, h] of what a call returned."""
        out, lse = (part.float().cpu().numpy() for part in returned)
        return out, np.swapaxes(lse, 1, 2)


@dataclasses.dataclass(frozen=True)
class FlashMLAPrefill:
    """Its sparse prefill over rows of bf16.

    Attributes:
        torch: the module.
        flash_mla: the module.
        rows: bf16 [slots, 1, 576], the memory of the JAX array it was made of.
        sm_scale: factor on the logits.
    """

    torch: Any
    flash_mla: Any
    rows: Any
    sm_scale: float

    name = "flashmla"

    @classmethod
    def over(cls, latents: BFloat16[Array, "slots width"], *, sm_scale: float) -> "FlashMLAPrefill":
        """The peer over a cache.

        Raises:
            ModuleNotFoundError: PyTorch or FlashMLA is not installed.
        """
        torch = required("torch", install=_INSTALL)
        flash_mla = required("flash_mla", install=_INSTALL)
        rows = torch.from_dlpack(jax.block_until_ready(latents))
        return cls(torch, flash_mla, rows.unsqueeze(1), sm_scale)

    def call(self, q: BFloat16[Array, "n h width"], indices: Int[Array, "n topk"]) -> Call:
        """A call on these inputs; padding and conversion happen here and not in it."""
        padded = jnp.pad(q, ((0, 0), (0, padded_heads(q.shape[1]) - q.shape[1]), (0, 0)))
        padded, indices = jax.block_until_ready((padded, indices))
        queries, slots = self.torch.from_dlpack(padded), self.torch.from_dlpack(indices)

        def run() -> tuple[Any, Any, Any]:
            return self.flash_mla.flash_mla_sparse_fwd(
                queries, self.rows, slots.unsqueeze(1), self.sm_scale, use_legacy=True
            )

        return run

    def wait(self, _: object) -> None:
        """Until all its work is done."""
        self.torch.cuda.synchronize()

    def results(self, returned: Any, heads: int) -> tuple[np.ndarray, np.ndarray]:
        """f32 out [n, h, 512] and lse [n, h] of what a call returned: out, max_logits, lse."""
        out, _, lse = (part.float().cpu().numpy() for part in returned)
        return out[:, :heads], lse[:, :heads]


def padded_heads(heads: int) -> int:
    """The least number of heads, at least `heads`, that FlashMLA has a kernel for.

    Raises:
        ValueError: there is none.
    """
    for kernel_heads in HEADS:
        if heads <= kernel_heads:
            return kernel_heads
    raise ValueError(f"{heads=}: expected at most {HEADS[-1]}; measure this case with --no-peer")
