"""Sizes of one MLA layer, named as in published model configs."""

import math
from dataclasses import dataclass, field

from jmla.rope import Rope


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Static sizes of a multi-head latent attention layer and its lightning indexer.

    The names follow the `config.json` of DeepSeek-V3.2 and GLM-5; one instance serves all layers.

    Attributes:
        hidden_size: width of the residual stream.
        num_heads: query heads held here (all of them, or one tensor-parallel shard).
        q_lora_rank: width of the compressed query, which the indexer shares.
        kv_lora_rank: no-position part of a latent, and the width of an attention output.
        qk_nope_head_dim: per-head query/key width without position.
        qk_rope_head_dim: rotary width, shared by all heads of a key.
        v_head_dim: per-head value width.
        index_n_heads: indexer heads; 0 for a model without an indexer (dense attention).
        index_head_dim: width of an indexer key.
        index_topk: tokens a query attends to.
        index_init_tokens: first tokens of a request that every query attends to.
        index_local_tokens: last tokens before a query, itself included, that it attends to.
        rope: rotary frequencies of keys and queries.
        index_rope_interleaved: pair order of the indexer's rotary part (DeepSeek-V3.2: False).
        norm_eps: epsilon of every normalisation here.
    """

    hidden_size: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048
    index_init_tokens: int = 0
    index_local_tokens: int = 0
    rope: Rope = field(default_factory=Rope)
    index_rope_interleaved: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self):
        for name in ("hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number.")
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"{self.qk_rope_head_dim=}: rotary values come in pairs; give an even number."
            )
        if self.index_n_heads and self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"{self.index_head_dim=} is narrower than {self.qk_rope_head_dim=}: the indexer "
                "rotates its first qk_rope_head_dim values; give index_head_dim at least that."
            )
        if self.index_n_heads and self.index_topk < 1:
            raise ValueError(f"{self.index_topk=}: expected a positive number.")
        forced = min(self.index_init_tokens, self.index_local_tokens)
        if forced < 0 or self.index_init_tokens + self.index_local_tokens > self.index_topk:
            raise ValueError(
                f"{self.index_init_tokens=}, {self.index_local_tokens=}: expected numbers of "
                f"tokens, together at most {self.index_topk=}."
            )

    @property
    def latent_dim(self) -> int:
        """Width of a cached latent and of an absorbed query."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def sm_scale(self) -> float:
        """Softmax scale: head width ** -0.5, times YaRN's squared attention factor."""
        head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.rope.attention_factor**2 / math.sqrt(head_dim)
