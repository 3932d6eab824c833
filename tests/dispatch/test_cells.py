"""The compatibility table, cell by cell: what says no is refused, what says yes has a plan."""

import warnings
from typing import Any

import pytest

from jmla import Config, GQAConfig, GQAPlan, KVLayout, resolve
from jmla.backends import HEADS_BACKENDS, HEADS_ENGINE_BACKENDS
from jmla.dispatch.cells import Cell, cells
from jmla.dispatch.document import support_document
from jmla.dispatch.fp4 import FP4CompatibilityError
from jmla.plan import Plan

YES = [cell for cell in cells() if cell.supported]
NO = [cell for cell in cells() if not cell.supported]
KERNEL = "runs on the device kernel for sm_90 (Hopper)"


def resolve_cell(cell: Cell, page_size: int, implementation: str | None = None) -> Plan | GQAPlan:
    """The plan whose phase the cell is, on Hopper, for the sizes of published models."""
    name: dict[str, Any] = {f"{cell.phase}_backend": cell.backend}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(cell.storage, KVLayout):
            config = Config(
                num_heads=16,
                sm_scale=0.1,
                layout=cell.storage,
                kv_lora_rank=cell.storage.default_rank,
                platform="sm_90",
                page_size=page_size,
                implementation=implementation,
                **name,
            )
            return resolve(config)
        return resolve(
            GQAConfig(
                num_heads=16,
                num_kv_heads=4,
                sm_scale=0.1,
                kv_cache_dtype=cell.storage,
                platform="sm_90",
                page_size=page_size,
                implementation=implementation,
                **name,
            )
        )


@pytest.mark.parametrize("cell", YES, ids=str)
def test_yes_has_a_plan_that_says_what_runs_it(cell: Cell) -> None:
    plan = resolve_cell(cell, (cell.page_sizes or (64,))[0])
    if isinstance(plan, Plan):
        phase = getattr(plan, cell.phase)
        assert plan.layout is cell.storage
        assert phase.reasons[-1].startswith(KERNEL) == cell.kernel
    else:
        assert (plan.backend, plan.kv_cache_dtype) == (cell.backend, cell.storage)
        assert (KERNEL in str(plan)) == cell.kernel


@pytest.mark.parametrize("cell", NO, ids=str)
def test_no_is_refused_with_a_reason_and_what_is_accepted(cell: Cell) -> None:
    with pytest.raises(ValueError) as error:
        resolve_cell(cell, (cell.page_sizes or (64,))[0])
    reasons, _, changes = str(error.value).partition("Any one of these changes is accepted")
    assert f"{cell.phase}_backend={cell.backend!r}" in reasons
    assert changes.count("\n- "), "no way out"
    if cell.kv_cache_dtype == "fp4_e2m1":
        assert isinstance(error.value, FP4CompatibilityError)


@pytest.mark.parametrize("cell", [cell for cell in YES if cell.page_sizes], ids=str)
def test_other_page_sizes_are_refused(cell: Cell) -> None:
    with pytest.raises(ValueError, match="takes pages of"):
        resolve_cell(cell, 128)


@pytest.mark.parametrize("engine", HEADS_ENGINE_BACKENDS, ids=lambda engine: engine.name)
def test_other_names_of_the_engines_are_refused_for_heads(engine) -> None:
    config: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "sm_scale": 0.1, "platform": "cpu"}
    for dtype in ("bfloat16", "fp4_e2m1"):
        with pytest.raises(ValueError, match=f"'{engine.name}' is a backend of the") as error:
            resolve(GQAConfig(**config, kv_cache_dtype=dtype, decode_backend=engine.name))
        assert "expected 'fa3' or 'trtllm_mha'" in str(error.value)
        assert isinstance(error.value, FP4CompatibilityError) == (dtype == "fp4_e2m1")
    assert all(any(row.name == name for row in HEADS_BACKENDS) for name in engine.nearest)
    with pytest.raises(ValueError, match="'fa5' is not known"):
        resolve(GQAConfig(**config, decode_backend="fa5"))


def test_a_plan_for_heads_says_why_no_kernel_runs() -> None:
    config: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 2, "sm_scale": 0.1}
    assert "XLA: no device kernel serves it on cpu" in str(
        resolve(GQAConfig(**config, platform="cpu"))
    )
    assert "heads of 64 or 128 values only" in str(
        resolve(GQAConfig(**config, platform="sm_90", head_dim=96))
    )
    others: list[dict[str, Any]] = [{"platform": "cpu"}, {"platform": "sm_90", "head_dim": 96}]
    for changes in others:
        with pytest.raises(NotImplementedError, match="implementation='mosaic_gpu'"):
            resolve(GQAConfig(**config, **changes, implementation="mosaic_gpu"))


def test_the_document_has_a_row_for_each_backend() -> None:
    table = support_document().partition("## Compatibility")[2].partition("## What reads")[0]
    for cell in cells():
        row = f"| {cell.attention.upper()} | `{cell.backend}` |"
        assert table.count(row) == 1
    assert "| MHA | `fa3` | any | no | no | no | kernel | kernel | kernel | yes |" in table


def test_a_config_for_heads_names_every_problem() -> None:
    with pytest.raises(ValueError) as error:
        GQAConfig(num_heads=0, num_kv_heads=2, sm_scale=-1, kv_cache_dtype="int8", head_dim=0)
    for name in ("num_heads", "sm_scale", "kv_cache_dtype", "head_dim"):
        assert f"- {name}" in str(error.value)
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        GQAConfig(num_heads=5, num_kv_heads=2, sm_scale=0.1)
