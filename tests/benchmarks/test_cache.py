"""The benchmark of cache rows on tiny cases, timed by the host's clock."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.cache import CASES, MANY, Bench, Case, prepare, table
from tests.benchmarks.test_sparse_decode import CEILINGS, ENVIRONMENT, KEYS, TIMER, refuse

SCALE = 1 << 14
# One case of each op.
FEW = list({case.op: case for case in reversed(CASES)}.values())


def test_each_op_is_measured():
    bench = Bench(TIMER, CEILINGS, ENVIRONMENT, "xla", scale=SCALE)
    records = list(bench.run(FEW[:-1], refuse))
    beside = dataclasses.replace(bench, with_xla=True)
    records += beside.run(FEW[-1:], refuse)
    assert [record.op for record in records] == [case.op for case in FEW]
    for record in records:
        line = json.loads(record.to_json())
        assert set(line) >= KEYS
        assert line["ours_us"] > 0 and line["floor_us"] > 0
        assert (record is records[-1]) == bool(line["xla_us"])
        assert line["peer"] is line["peer_us"] is None
    assert table(records).row_count == len(FEW)


@pytest.mark.parametrize(
    ("op", "layout", "size"),
    [("requantize", "576", 576 + 656), ("quantize", "fp4", 1152 + 324), ("convert", "656", 1232)],
)
def test_bytes_are_those_read_and_written(op: str, layout: str, size: int):
    assert prepare(Case(op, layout, MANY), "xla", SCALE).bytes == MANY // SCALE * size


def test_an_unknown_op_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert command.main(["cache", "--ops", "swap", "--timer", "wall"]) == 2
    assert "expected names of requantize" in capsys.readouterr().err
