"""The MLA layer with its lightning indexer, as functions over a pytree of parameters."""

from jmla.model.config import MLAConfig
from jmla.model.layer import Attended, choose_positions, mla_attention
from jmla.model.mla import (
    IndexerInputs,
    Projections,
    absorbed_query,
    init_mla,
    project,
    project_output,
)
from jmla.norm import layer_norm, rms_norm
from jmla.rope import Rope, apply_rope, cos_sin

__all__ = [
    "Attended",
    "IndexerInputs",
    "MLAConfig",
    "Projections",
    "Rope",
    "absorbed_query",
    "apply_rope",
    "choose_positions",
    "cos_sin",
    "init_mla",
    "layer_norm",
    "mla_attention",
    "project",
    "project_output",
    "rms_norm",
]
