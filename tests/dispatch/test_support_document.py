from pathlib import Path

from jmla.backends import (
    BACKENDS,
    DEFAULTS,
    ENGINE_BACKENDS,
    KERNELS,
    PHASES,
    access,
    backends_of,
    kernels_of,
    kernels_over,
    serves,
    sizes_problem,
)
from jmla.cache import init_cache
from jmla.config import Config
from jmla.dispatch.document import support_document
from jmla.dispatch.resolve import resolve
from jmla.layouts.base import KVLayout

NAMES = [*(row.name for row in BACKENDS), *(row.name for row in ENGINE_BACKENDS)]

DOCUMENT = Path(__file__).parents[2] / "docs" / "attention_backends.md"


def test_the_document_is_what_the_table_says() -> None:
    assert DOCUMENT.read_text() == support_document(), (
        "run python -m jmla.dispatch.document > docs/attention_backends.md"
    )


def test_the_table_names_each_backend_once_and_no_refused_one() -> None:
    assert len(set(NAMES)) == len(NAMES)


def test_each_phase_reads_a_layout_in_one_way() -> None:
    for backend in BACKENDS:
        for rows in (backend.prefill, backend.decode):
            assert len({row.layout for row in rows}) == len(rows)


def test_nearest_backends_of_refused_names_exist_for_both_phases() -> None:
    for engine in ENGINE_BACKENDS:
        for phase in PHASES:
            assert any(serves(name, phase) for name in engine.nearest), engine


def test_a_default_reads_its_layout_and_the_last_one_takes_any_page_and_sinks() -> None:
    for row in DEFAULTS:
        for phase, names in (("prefill", row.prefill), ("decode", row.decode)):
            assert all(access(name, phase, row.layout) for name in names)  # type: ignore[arg-type]
            (last,) = (backend for backend in BACKENDS if backend.name == names[-1])
            assert last.sinks
            assert not last.page_sizes


def test_kernels_serve_what_reads_their_indices_and_layouts() -> None:
    served = {
        (phase, name) for phase in PHASES for name in backends_of(phase) if kernels_of(name, phase)
    }
    names = ("flashmla_sparse", "flashmla_kv", "trtllm", "fa3", "flashmla")
    assert served == {(phase, name) for phase in PHASES for name in names}
    dense_decode, dense_prefill, decode, *prefill = KERNELS
    assert kernels_of("flashmla", "decode") == (dense_decode,)
    assert kernels_of("flashmla", "prefill") == (dense_prefill,)
    assert kernels_of("flashmla_sparse", "decode") == (decode,)
    assert kernels_of("flashmla_sparse", "prefill") == tuple(prefill)
    assert kernels_of("flashmla_kv", "prefill") == tuple(prefill[:1])
    assert kernels_over("flashmla_sparse", "prefill", KVLayout.FP4) == tuple(prefill[1:])
    assert not kernels_over("flashmla_sparse", "prefill", KVLayout.FP8_V4)


def test_refusals_and_the_document_use_the_same_names() -> None:
    text = support_document()
    for name in NAMES:
        assert f"`{name}`" in text
    assert resolve(Config(num_heads=1, sm_scale=1.0)).prefill.backend in text


def test_the_sizes_a_layout_takes_are_those_it_can_be_made_for() -> None:
    for layout in KVLayout:
        for rank, rope_dim in ((512, 64), (448, 64), (512, 0), (96, 16), (100, 12), (104, 24)):
            try:
                init_cache(layout, num_pages=0, rank=rank, rope_dim=rope_dim)
                defined = True
            except ValueError:
                defined = False
            assert (sizes_problem(layout, rank, rope_dim) is None) == defined, (layout, rank)
