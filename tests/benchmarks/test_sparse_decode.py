"""The benchmark command on tiny cases, timed by the host's clock."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks import __main__ as command
from benchmarks import ops, records
from benchmarks.floors import Ceilings, Gather, floor_us, measure_ceilings
from benchmarks.inputs import RUN, random_cache, random_slots
from benchmarks.peers import padded_heads
from benchmarks.sparse_decode import CASES, Bench, Cache, Case, Sizes, caches
from benchmarks.timing import WallTimer
from jmla import KVLayout

TIMER = WallTimer(warmup=1, calls=2, cooldown_s=0.0)
CEILINGS = Ceilings(copy_gbps=4000.0, matmul_tflops=700.0)
ENVIRONMENT = records.Environment("2026-01-02T03:04:05+00:00", "NVIDIA H200", "jax 1", "abc")
SIZES = Sizes(slots=512, rotated_bytes=1 << 16, checked=2)
TINY = Case(b=2, h=2, s_q=2, topk=70)
# What every benchmark of this repository writes.
KEYS = {"op", "case", "ours_us", "peer", "peer_us", "floor_us", "bytes", "flops"}
KEYS |= {"error", "peer_error", "date", "gpu", "versions", "commit"}


def bench(implementation: str = "xla") -> Bench:
    return Bench(
        TIMER,
        CEILINGS,
        ENVIRONMENT,
        implementation,  # type: ignore[arg-type]
        with_peer=False,
        sizes=SIZES,
    )


def refuse(name: str, error: Exception) -> None:
    raise AssertionError(name) from error


def test_case_names():
    names = [case.name for case in CASES]
    assert names == [
        "b128-h128",
        "b64-h128",
        "b128-s_q2-h128",
        "b128-h64",
        "b128-h32",
        "b128-h16",
        "b128-h8",
        "b1-h128",
        "b2-s_q2-h128",
        "b16-h128",
        "b148-s_q2-h128-topk16384",
        "b128-h128-clustered",
        "b128-h16-clustered",
    ]
    assert CASES[0].describe("656") == "layout=656 b=128 h=128 s_q=1 topk=2048"


def test_flops_count_both_products():
    assert Case(128, 128).flops(576, 512) == 2 * 128 * 128 * 2048 * 1088


def test_only_block_scales_come_in_two_formats():
    assert caches(["656", "fp4"], ["pow2", "fp32"]) == [
        Cache("656", "pow2"),
        Cache("656", "fp32"),
        Cache("fp4", None),
    ]
    assert caches(["656-packed", "584-pages"], ["fp32"]) == [
        Cache("656-packed", "fp32"),
        Cache("584-pages", None),
    ]
    assert Cache("656-packed", "fp32").has_peer and not Cache("584-pages", None).has_peer


@pytest.fixture(scope="module")
def block_scale() -> records.Record:
    (record,) = bench().run([TINY], [Cache("656", "fp32")], failed=refuse)
    return record


def test_a_tiny_case(block_scale: records.Record):
    record = block_scale
    assert record.bytes == 4 * 70 * 656 and 0 < record.unique_bytes <= record.bytes
    assert record.unique_bytes % 656 == 0
    assert record.flops == 2 * 4 * 70 * 2 * (576 + 512)
    assert record.ours_us > 0 and record.first_call_s > 0
    assert record.tflops == pytest.approx(record.flops / record.ours_us / 1e6)
    assert record.gbps == pytest.approx(record.bytes / record.ours_us / 1e3)
    # Rounding the exact output to bf16 alone costs 1.7e-3.
    assert 0.0 < record.error < 4e-3
    assert record.lse_error < 1e-4
    assert record.peer is None and record.peer_us is None and record.peer_error is None
    assert record.gather_by in ("cuda", "xla") and record.floor_us >= record.gather_us


def test_a_tiny_case_whose_value_is_the_whole_row():
    (record,) = bench().run([TINY], [Cache("584", None)], failed=refuse)
    assert record.bytes == 4 * 70 * 584
    assert record.flops == 2 * 4 * 70 * 2 * (512 + 512)
    assert 0.0 < record.error < 4e-3


@pytest.mark.parametrize(
    ("packed", "apart"),
    [
        (Cache("656-packed", "pow2"), Cache("656", "pow2")),
        (Cache("584-pages", None), Cache("584", None)),
    ],
    ids=["656", "584"],
)
def test_bytes_in_place_give_what_rows_apart_give(packed: Cache, apart: Cache):
    ours, wanted = bench().run([TINY], [packed, apart], failed=refuse)
    assert ours.case.startswith(f"layout={packed.layout} ")
    assert (ours.bytes, ours.flops) == (wanted.bytes, wanted.flops)
    assert (ours.error, ours.lse_error) == (wanted.error, wanted.lse_error)


def test_what_has_no_kernel_is_reported_and_the_rest_goes_on():
    failures: list[tuple[str, str]] = []
    unknown = bench("no such implementation")
    cache = [Cache("bf16", None), Cache("bf16", None)]
    found = unknown.run(
        [TINY], cache, failed=lambda *pair: failures.append((pair[0], str(pair[1])))
    )
    assert list(found) == []
    assert [name for name, _ in failures] == ["b2-s_q2-h2-topk70 bf16"] * 2
    assert "expected 'mosaic_gpu'" in failures[0][1]


def test_a_record_is_a_line_of_json_and_a_row_of_a_table(
    tmp_path: Path, block_scale: records.Record
):
    both = dataclasses.replace(
        block_scale,
        ours_us=100.0,
        peer="flashmla",
        peer_us=123.456789,
        peer_error=1e-3,
        peer_lse_error=0.0,
    )
    path = tmp_path / "new" / "H200.jsonl"
    for record in (block_scale, both):
        records.append(record, path)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert set(first) >= KEYS and set(first) == set(second)
    assert set(first) >= {"tflops", "gbps", "first_call_s", "indices", "scale_format"}
    assert (first["op"], first["peer_us"], first["gpu"]) == ("sparse_decode", None, "NVIDIA H200")
    assert first["case"] == "layout=656 b=2 h=2 s_q=2 topk=70"
    assert (second["peer"], second["peer_us"], second["ours_us"]) == ("flashmla", 123.46, 100.0)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(records.table([block_scale, both]))
    text = capture.get()
    assert "123.5" in text and "1.23" in text and "fp32" in text


def test_the_results_file_is_named_after_the_gpu():
    assert records.results_path("NVIDIA H200").name == "H200.jsonl"
    assert records.results_path("NVIDIA H100 80GB HBM3").name == "H100-80GB-HBM3.jsonl"


def test_environment_names_versions_and_commit():
    found = records.environment(commit="abc")
    assert found.commit == "abc" and "jax 0" in found.versions
    assert isinstance(records.environment().commit, str)


def test_the_floor_is_the_slower_of_reading_and_arithmetic():
    # 1.4 TFLOP at 700 TFLOPS are 2000 µs.
    assert floor_us(1500.0, 1_400_000_000_000, CEILINGS) == pytest.approx(2000.0)
    assert floor_us(2500.0, 1_400_000_000_000, CEILINGS) == 2500.0


def test_ceilings_and_gather_are_rates_of_this_machine():
    found = measure_ceilings(TIMER, copy_bytes=1 << 16, matmul_size=64)
    assert found.copy_gbps > 0 and found.matmul_tflops > 0
    gather = Gather.for_rows(128, 324)
    assert gather.row_bytes == 320
    assert Gather("xla", 128, 320).measure(TIMER, [jnp.zeros((2, 3), jnp.int32)] * 2) > 0


def test_clustered_slots_are_runs_of_neighbours():
    rng = np.random.default_rng(0)
    slots = random_slots(rng, (3, 2, 2 * RUN + 5), slots=1024, kind="clustered")
    assert slots.shape == (3, 2, 2 * RUN + 5) and slots.dtype == np.int32
    assert slots.min() >= 0 and slots.max() < 1024
    steps = np.diff(slots[..., :RUN])
    assert (steps == 1).all()
    uniform = random_slots(rng, (3, 2, 7), slots=1024, kind="uniform")
    assert uniform.shape == (3, 2, 7) and (np.diff(uniform) != 1).any()


def test_a_cache_has_whole_pages():
    with pytest.raises(ValueError, match="slots=65"):
        random_cache(KVLayout.BF16, slots=65, page_size=64)


@pytest.mark.parametrize(("heads", "padded"), [(1, 64), (64, 64), (65, 128), (128, 128)])
def test_the_peer_pads_heads(heads: int, padded: int):
    assert padded_heads(heads) == padded


def test_the_peer_has_no_kernel_for_more_heads():
    with pytest.raises(ValueError, match="heads=129"):
        padded_heads(129)


@pytest.mark.parametrize(
    ("option", "message"),
    [("--cases=b3-h3", "b128-h128"), ("--layouts=657", "656"), ("--scale-formats=", "pow2, fp32")],
)
def test_unknown_names_are_refused(option: str, message: str, capsys: pytest.CaptureFixture[str]):
    assert command.main(["sparse_decode", "--no-peer", option]) == 2
    said = capsys.readouterr().err
    assert option.partition("=")[0] in said and message in said


def test_a_missing_peer_is_said_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert command.main(["sparse_decode", "--timer=wall"]) == 2
    assert "--no-peer" in capsys.readouterr().err


def test_a_device_timer_needs_a_device(capsys: pytest.CaptureFixture[str]):
    if jax.default_backend() == "gpu":
        pytest.skip("there is one")
    assert command.main(["sparse_decode", "--no-peer"]) == 2
    assert "cupti needs a GPU" in capsys.readouterr().err


def test_the_command_writes_what_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ops, "CASES", {TINY.name: TINY})
    monkeypatch.setattr(command, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(command, "MATMUL_SIZE", 64)
    monkeypatch.setattr(command, "TIMERS", {"wall": lambda: TIMER})
    monkeypatch.setattr(ops, "SIZES", SIZES)
    path = tmp_path / "results.jsonl"
    arguments = f"sparse_decode --timer wall --implementation xla --layouts bf16 --out {path}"
    assert command.main(arguments.split()) == 0
    assert json.loads(path.read_text())["implementation"] == "xla"
    assert "speedup" in capsys.readouterr().out
