"""The support table as a Markdown document, written from the data in `jmla.backends`."""

import sys
from collections.abc import Iterable

from jmla._mosaic_decode import ROPE_DIM
from jmla.backends import (
    BACKENDS,
    DEFAULTS,
    ENGINE_BACKENDS,
    HEADS_ENGINE_BACKENDS,
    HISPARSE_BACKENDS,
    PHASES,
    Phase,
    access,
    backends_of,
    dtype_of,
    kernels_of,
    layouts_read,
)
from jmla.dispatch.cells import cells
from jmla.dispatch.fp4 import ENGINE_RULES, fp4_backends
from jmla.layouts.base import KVLayout
from jmla.layouts.key_values import KEY_VALUE_DTYPES

_INTRODUCTION = """\
# Attention backends

This page is written by `python -m jmla.dispatch.document > docs/attention_backends.md` from the
table that `jmla.resolve` decides from; a test keeps the two the same.

A *backend* is a contract: which phase it serves, which cache layouts it reads, how, and which
indices it takes. The names are the serving engines', so that a config carries over. On every
platform XLA fulfils every contract; a device kernel makes one faster. `str(jmla.resolve(config))`
tells what a config leads to, and why."""

_COMPATIBILITY = """\
By the serving engines' words for a cache: **kernel** runs on a device kernel on `sm_90` (Hopper)
and on XLA elsewhere, **XLA** runs on XLA everywhere, **some** is a kernel for some of the layouts
of that dtype, **no** is refused by `jmla.resolve` with the reason and what is accepted instead.
Every cell that is not **no** has a test for a Hopper, which takes its cases from this table.

MLA keeps latents, as a `jmla.Config` says; MHA, with grouped query heads or not, keeps keys and
values of several heads, as a `jmla.GQAConfig` says. Prompts of MHA need no backend of jmla: their
keys and values are at hand, and any attention serves them. Decode takes several tokens of each
request, masked causally, in every backend that has it."""

_READS = f"""\
What the cells say:

- **direct**: the stored rows are read in place.
- **gather**: the rows that are needed are gathered and dequantised to BF16: in prefill each token
  of the batch once, in decode the selected slots.
- **convert**: the pages that the batch touches are re-packed to block-scale rows, exactly; the
  cache stays as it is.
- **PAGED**: selected positions become slots of the cache. **RAGGED**: they become rows of the
  gathered buffer. **page table**: dense attention to every token, no selection.
- **kernels**: where a device kernel runs, over which of the layouts, for latents of
  {KVLayout.BF16.default_rank} + {ROPE_DIM} values, of `FP8_V4` \
{KVLayout.FP8_V4.default_rank} + {ROPE_DIM}. It reads the stored rows in place, also
  where the cell says gather. The rest runs on XLA."""

_AUTO = """\
`flashmla_auto` stands for `flashmla_sparse` or `flashmla_kv`, by layout, platform and sinks alone:
`flashmla_kv` for the FP8 layouts (on Blackwell `flashmla_sparse` for block scales),
`flashmla_sparse` for the others and for models with attention sinks."""

_FASTEST = """\
A prefill that is left to jmla, or to `flashmla_auto`, need not read as the table says: on Hopper,
where the kernels serve both ways, a call reads rows of few bits in place or gathers them first,
whichever was faster on an H200 for its heads, tokens and page table. The plan says from how many
tokens on (`str(plan)`), and for any sizes (`plan.prefill.reads_of`). A named backend reads as
named."""

_CHUNKS = """\
One rule holds for every backend, layout and chunk: **a query attends to stored rows, its own
chunk's included**. Append a chunk first, then call the phase. What a layout rounds away is then
gone for old and new rows alike, so that a prompt gives the same results however it is chunked, a
decode step those of prefill at its position, and prefix caching changes nothing. *The same* is up
to rounding: the shapes of a call choose the kernel's blocks and the way to read, and block scales
of `scale_format="fp32"` are rounded with their values to BF16 where rows are gathered."""

_FP4 = """\
An FP4 cache needs both phases to read it; the two may differ, with a warning that names both. The
serving engine's rule let any two different backends through and failed later; here each phase is
checked by itself, and a pair of which one half cannot read FP4 is an `FP4CompatibilityError`."""


def support_document() -> str:
    """The text of `docs/attention_backends.md`."""
    layouts = [layout.name for layout in KVLayout]
    sections = [
        _INTRODUCTION,
        "## Compatibility\n\n" + _COMPATIBILITY + "\n\n" + _table(_header(), _cell_rows()),
        "## What reads what",
        _READS,
        *(
            f"### {phase.capitalize()}\n\n"
            + _table(
                ["backend", *(f"`{name}`" for name in layouts), "pages", "sinks", "kernels"],
                _support_rows(phase),
            )
            for phase in PHASES
        ),
        _AUTO,
        _FASTEST,
        "## Chunked prefill and prefixes\n\n" + _CHUNKS,
        "## Which pairs share a cache\n\n"
        + _table(["layout", "prefill", "decode"], _pair_rows())
        + "\n\nAny prefill of a row works with any decode of the same row.",
        "## Defaults\n\n"
        + _table(["cache", "platform", "prefill", "decode"], _default_rows())
        + "\n\nThe first that takes the page size and the sinks of the config.",
        "`kv_cache_dtype='auto'` is `fp8_e4m3` on Blackwell and `bfloat16` elsewhere and with "
        "sinks,\nunless a named backend cannot read that; with `trtllm` in either phase it is the "
        "FP8 row.\n`'fp8_e4m3'` means block scales, unless a named backend reads the plain FP8 "
        "row only, or on\nBlackwell a phase is left to the default.",
        "## HiSparse\n\n" + _table(["kv_cache_dtype", "layout", "both phases"], _hisparse_rows()),
        "## FP4\n\n" + _FP4 + "\n\n" + _table(_FP4_HEADER, _fp4_rows()),
        "## Names of the serving engines that jmla refuses\n\n"
        + _table(["attention", "name", "nearest here"], _engine_rows()),
    ]
    return "\n\n".join(sections) + "\n"


def _header() -> list[str]:
    columns = [f"{phase} {dtype}" for phase in PHASES for dtype in KEY_VALUE_DTYPES]
    return ["attention", "backend", "pages", *columns, "s_q > 1"]


def _cell_rows() -> list[list[str]]:
    rows = {(cell.attention, cell.backend): cell for cell in cells()}
    return [
        [
            cell.attention.upper(),
            f"`{cell.backend}`",
            " or ".join(map(str, cell.page_sizes)) or "any",
            *(
                _cell(attention, backend, phase, dtype)
                for phase in PHASES
                for dtype in KEY_VALUE_DTYPES
            ),
            "yes" if _has(attention, backend, "decode") else "no",
        ]
        for (attention, backend), cell in rows.items()
    ]


def _has(attention: str, backend: str, phase: Phase) -> bool:
    key = (attention, backend, phase)
    return any(
        cell.supported for cell in cells() if (cell.attention, cell.backend, cell.phase) == key
    )


def _cell(attention: str, backend: str, phase: Phase, dtype: str) -> str:
    key = (attention, backend, phase, dtype)
    served = [
        cell.kernel
        for cell in cells()
        if cell.supported and (cell.attention, cell.backend, cell.phase, cell.kv_cache_dtype) == key
    ]
    if not any(served):
        return "XLA" if served else "no"
    return "kernel" if all(served) else "some"


_FP4_HEADER = ["attention", "phase", "jmla", "serving engine", "once accepted there"]


def _support_rows(phase: Phase) -> list[list[str]]:
    rows = []
    for backend in BACKENDS:
        if backend.name not in backends_of(phase):
            continue
        if backend.picks:
            readable = layouts_read(backend.name, phase)
            cells = ["as picked" if layout in readable else "" for layout in KVLayout]
            pages = sinks = kernels = "as picked"
        else:
            cells = [_access_cell(backend.name, phase, layout) for layout in KVLayout]
            pages = " or ".join(map(str, backend.page_sizes)) or "any"
            sinks = "yes" if backend.sinks else "no"
            kernels = _kernels_cell(backend.name, phase)
        rows.append([f"`{backend.name}`", *cells, pages, sinks, kernels])
    return rows


def _access_cell(name: str, phase: Phase, layout: KVLayout) -> str:
    how = access(name, phase, layout)
    if how is None:
        return ""
    reads = "gather" if how.reads == "gather_dequantize" else how.reads
    indices = "page table" if how.indices == "PAGE_TABLE" else how.indices
    return f"{reads}, {indices}"


def _kernels_cell(name: str, phase: Phase) -> str:
    cells = []
    for kernel in kernels_of(name, phase):
        layouts = [each for each in layouts_read(name, phase) if each in kernel.layouts]
        served = "all" if len(layouts) == len(layouts_read(name, phase)) else ""
        cells.append(f"{_code(kernel.platforms)}: {served or _code(x.name for x in layouts)}")
    return "; ".join(cells) or "none yet"


def _pair_rows() -> list[list[str]]:
    return [
        [
            f"`{layout.name}`",
            *(
                _code(name for name in backends_of(phase) if layout in layouts_read(name, phase))
                for phase in PHASES
            ),
        ]
        for layout in KVLayout
    ]


def _default_rows() -> list[list[str]]:
    platforms = {None: "all", True: "Blackwell", False: "all others"}
    return [
        [f"`{row.layout.name}`", platforms[row.blackwell], _code(row.prefill), _code(row.decode)]
        for row in DEFAULTS
    ]


def _hisparse_rows() -> list[list[str]]:
    return [
        [f"`{dtype_of(layout)}`", f"`{layout.name}`", f"`{backend}`"]
        for layout, backend in HISPARSE_BACKENDS
    ]


def _fp4_rows() -> list[list[str]]:
    rows = []
    for rule in ENGINE_RULES:
        phases: tuple[Phase, ...] = ("decode",) if rule.fa4_prefill else PHASES
        ours = [_code(fp4_backends(rule.attention, phase)) or "none" for phase in phases]
        when = "decode behind fa4" if rule.fa4_prefill else "both"
        if rule.fa4_prefill:
            ours = ["no fa4"]
        cell = ours[0] if len(set(ours)) == 1 else f"prefill {ours[0]}; decode {ours[1]}"
        rows.append([rule.attention.upper(), when, cell, _code(rule.accepted), _code(rule.once)])
    return rows


def _engine_rows() -> list[list[str]]:
    refused = (("MLA", ENGINE_BACKENDS), ("MHA", HEADS_ENGINE_BACKENDS))
    return [
        [kind, f"`{engine.name}`", _code(engine.nearest)]
        for kind, engines in refused
        for engine in engines
    ]


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(support_document())
