"""The benchmarks of host-resident caches on tiny cases, timed by the host's clock."""

import itertools
import json

import numpy as np
import pytest

from benchmarks import hisparse_capacity
from benchmarks.hisparse import CASES, Bench, Case, drifting, table
from benchmarks.hisparse_trace import misses
from jmla.model import MLAConfig
from tests.benchmarks.test_sparse_decode import CEILINGS, ENVIRONMENT, KEYS, TIMER, refuse
from tests.hisparse.oracle import Buffer


def test_each_op_is_measured():
    few = [
        Case("swap_in", b=2, fresh=0.5),
        Case("append", b=2),
        Case("admit", b=1),
        Case("fetch", b=2, fresh=0.5, layers=2),
    ]
    assert {case.op for case in few} == {case.op for case in CASES}
    records = list(Bench(TIMER, CEILINGS, ENVIRONMENT, "xla", scale=1 << 8).run(few, refuse))
    for record, case in zip(records, few, strict=True):
        line = json.loads(record.to_json())
        assert set(line) >= KEYS
        assert line["op"] == case.op and line["ours_us"] > 0
        assert line["link_gbps"] > 0 and line["bytes"] > 0
    assert 0 < records[0].misses < 2 * 8
    assert records[0].misses == records[3].misses
    assert table(records).row_count == len(few)


def test_selections_drift():
    choices = drifting(Case("swap_in", b=3, fresh=0.25), 10_000, 64)
    for before, after in itertools.pairwise(choices):
        for row, then in zip(before, after, strict=True):
            assert 64 - 17 <= len(np.intersect1d(row, then)) < 64
    still = drifting(Case("swap_in", b=1), 10_000, 64)
    assert all((each == still[0]).all() for each in still)


@pytest.mark.parametrize("kind", ["full", "hisparse"])
def test_a_step_of_all_layers_is_measured(kind: str):
    model = MLAConfig(
        hidden_size=32, num_heads=2, q_lora_rank=16, index_n_heads=2, index_topk=32, v_head_dim=16
    )
    sizes = [f"--{kind}", "2", "--layers", "1", "--context", "512", "--calls", "1"]
    options = hisparse_capacity.parse_arguments([*sizes, "--turned", "0.5"])
    options.reserved_gb = 0
    (line,) = hisparse_capacity.measure(options, ENVIRONMENT, model)
    assert {"op", "case", "ours_us", "commit", "date"} <= set(json.loads(line.to_json()))
    assert line.fits and line.tokens_per_s is not None and line.tokens_per_s > 0
    assert (line.host_bytes == 2 * 512 * 656) == (kind == "hisparse")
    assert (0 < line.missed < 1) == (kind == "hisparse")
    if kind == "full":
        assert line.device_bytes == 2 * 512 * 788


def test_misses_are_those_of_the_lru_rule():
    rng = np.random.default_rng(0)
    prompt, steps, k, size = 40, 30, 8, 12
    chosen = np.stack([rng.permutation(prompt)[:k] for _ in range(2 * steps)])
    chosen = chosen.reshape(steps, 2, k).astype(np.int32)
    chosen[:, :, 0] = prompt + np.arange(steps)[:, None]  # the newest token is never fetched
    got = misses(chosen, prompt, size)
    for layer in range(2):
        buffer = Buffer(size, 1)
        buffer.admit(prompt)
        for step in range(steps):
            length = prompt + step + 1
            buffer.append(length, 1)
            buffer.swap(chosen[step, layer].tolist(), length)
            assert got[step, layer] == len(buffer.fetched)
