"""A resolved config: the jitted prefill and decode of one cache, and why they are what they are.

Both phases share the cache and nothing else.

Every query attends to *stored* rows: append a step's latents first, then call the phase. A prompt
thus gives the same result however it is cut into chunks, and whatever the rows' layout rounds away
is gone for prefill and decode alike.
"""

import dataclasses

from jaxtyping import Array, BFloat16, Float, Int

from jmla.cache import Cache, init_cache
from jmla.config import Config, HiSparseConfig
from jmla.hisparse.sizes import HiSparseSizes
from jmla.hisparse.state import HiSparseState, init_state
from jmla.layouts.base import KVLayout
from jmla.phase_plan import DecodePlan, PrefillPlan, decode_hisparse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What `jmla.resolve` makes of a config. Hashable; `str(plan)` explains every choice.

    Attributes:
        config: the config, as it was given.
        platform: the platform it was resolved for, never "auto".
        layout: the layout of the cache.
        layout_reason: why it is that one.
        prefill: the prefill; call it.
        decode: the decode step; call it.
        warnings: what works but deserves a second look.
        explanation: all of this in words, what `str` gives; left out of comparisons.
    """

    config: Config
    platform: str
    layout: KVLayout
    layout_reason: str
    prefill: PrefillPlan
    decode: DecodePlan
    warnings: tuple[str, ...] = ()
    explanation: str = dataclasses.field(default="", compare=False)

    def init_cache(self, num_pages: int) -> Cache:
        """An empty cache of `num_pages` pages in the plan's layout.

        It has index keys unless both phases are dense or `index_head_dim` is None. With HiSparse
        it is what the prefill writes, and what requests are admitted from.
        """
        config = self.config
        return init_cache(
            self.layout,
            num_pages=num_pages,
            page_size=config.page_size,
            rank=config.kv_lora_rank,
            rope_dim=config.rope_dim,
            scale_format=config.scale_format,
            index_dim=self.index_dim,
            index_hadamard=config.index_hadamard,
        )

    def hisparse_sizes(
        self, *, requests: int, max_length: int, num_buffer_pages: int, newest: int = 1
    ) -> HiSparseSizes:
        """The sizes of a host-resident cache whose device memory holds `num_buffer_pages` pages.

        Host memory holds `host_to_device_ratio` times as many.

        Args:
            requests: rows of the batch.
            max_length: tokens of the longest request.
            num_buffer_pages: pages of buffer rows on the device, for all requests together.
            newest: how many tokens of a request a step may append.

        Raises:
            ValueError: the config has no HiSparse, or a size is out of range.
        """
        config = self._hisparse_config
        return HiSparseSizes(
            requests=requests,
            max_length=max_length,
            page_size=self.config.page_size,
            num_pages=config.host_to_device_ratio * num_buffer_pages,
            num_buffer_pages=num_buffer_pages,
            device_buffer_size=config.buffer_rows(self.config.index_topk),
            newest=newest,
        )

    def init_hisparse(self, sizes: HiSparseSizes) -> HiSparseState:
        """An empty host-resident cache in the plan's layout, of one layer.

        Args:
            sizes: what `hisparse_sizes` gives, or others with the plan's page size.

        Raises:
            ValueError: the config has no HiSparse, or another page size.
        """
        config, _ = self.config, self._hisparse_config
        if sizes.page_size != config.page_size:
            raise ValueError(
                f"{sizes.page_size=}: expected {config.page_size=}, which the plan was resolved for"
            )
        return init_state(
            self.layout,
            sizes,
            rank=config.kv_lora_rank,
            rope_dim=config.rope_dim,
            scale_format=config.scale_format,
            index_dim=self.index_dim,
            index_hadamard=config.index_hadamard,
        )

    def decode_hisparse(
        self,
        q: BFloat16[Array, "b s_q h width"],
        state: HiSparseState,
        seq_lens: Int[Array, " b"],
        positions: Int[Array, "rows k"] | None,
        *,
        attn_sink: Float[Array, " h"] | None = None,
    ) -> tuple[BFloat16[Array, "b s_q h value"], Float[Array, "b s_q h"], HiSparseState]:
        """`decode` from a host-resident cache: swaps the selected rows in and attends to them.

        Args:
            q: bf16 [b, s_q, h, width], the queries at the last `s_q` positions of each request.
            state: with the new tokens appended.
            seq_lens: int32 [b], the new tokens included; 0 for an idle row.
            positions: int32 [b * s_q, k]; row `i * s_q + j` is for `q[i, j]`. As in prefill.
            attn_sink: f32 [h], if the config says so.

        Returns:
            out and lse as from `decode`, bit for bit, and the state after the step.

        Raises:
            ValueError: the config has no HiSparse, or an argument does not fit the others.
            NotImplementedError: the named implementation cannot serve the call.
        """
        assert self._hisparse_config
        return decode_hisparse(self.decode, q, state, seq_lens, positions, attn_sink)

    @property
    def _hisparse_config(self) -> HiSparseConfig:
        if self.config.hisparse is None:
            raise ValueError(
                f"{self.config.hisparse=}: the plan keeps its cache on the device: expected a "
                "HiSparseConfig; resolve a Config with hisparse=HiSparseConfig()"
            )
        return self.config.hisparse

    @property
    def index_dim(self) -> int | None:
        """The length of the cache's index keys; None if it has none."""
        transforms = (self.prefill.index_transform, self.decode.index_transform)
        return None if transforms == ("PAGE_TABLE",) * 2 else self.config.index_head_dim

    def __str__(self) -> str:
        return self.explanation
