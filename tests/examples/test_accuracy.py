"""The accuracy table: what it covers, that its numbers are bits per byte, and what it writes."""

import dataclasses
import io
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from examples import accuracy
from examples.byte_lm import ByteLMConfig, init_params
from examples.corpus import held_out_windows
from examples.generation import floor_positions
from examples.training import losses
from jmla import KVLayout, make_batch

SMALL = ByteLMConfig(
    mla=dataclasses.replace(ByteLMConfig().mla, index_topk=64), layers=1, mlp_size=16
)


def test_cases_cover_every_layout_and_mix():
    found = list(accuracy.cases(ByteLMConfig()))
    names = [case.name for case in found]
    assert names[0] == "dense attention" and names[-2:] == ["last 256 bytes", "random 256 bytes"]
    assert {layout.name for layout in KVLayout} <= set(names)
    pairs = {(case.name, case.plan.prefill.backend, case.plan.decode.backend) for case in found}
    assert len(pairs) == len(found)
    for prefill in ("flashmla_kv", "flashmla_sparse", "trtllm"):
        assert ("FP8_NOPE_FP8_ROPE", prefill, "trtllm") in pairs


def test_compare_measures_and_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "PROMPT", 40)
    monkeypatch.setattr(accuracy, "CHUNK", 32)
    monkeypatch.setattr(accuracy, "SCORED", (8, 8))
    everything = list(accuracy.cases(SMALL))
    few = [everything[0], next(c for c in everything if c.name == "BF16"), everything[-1]]
    monkeypatch.setattr(accuracy, "cases", lambda config: iter(few))
    params = init_params(jax.random.key(0), SMALL)
    rows = accuracy.compare(
        params, SMALL, windows=2, folder=tmp_path, console=Console(file=io.StringIO())
    )
    text = jnp.asarray(held_out_windows(49, 2)).astype(jnp.int32)
    # The model sees 48 bytes and chooses up to 64 of them: dense attention, as in training.
    whole = losses(params, SMALL, text, stage="dense", attention="xla")[0] * 48
    before = losses(params, SMALL, text[:, :41], stage="dense", attention="xla")[0] * 40
    bits = float(whole - before) / 8 / math.log(2)
    for row in rows[:2]:
        np.testing.assert_allclose([row.prefill_bits, row.decode_bits], bits, rtol=5e-3)
    written = json.loads((tmp_path / "accuracy.json").read_text())
    assert [row["name"] for row in written["rows"]] == [row.name for row in rows]
    table = (tmp_path / "accuracy.md").read_text()
    assert table.count("\n| ") == len(rows) + 1 and "+0.00 %" in table
    assert (tmp_path / "accuracy.png").stat().st_size > 1000


@pytest.mark.parametrize("chooser", ["last", "random"])
def test_floors_are_what_they_say(chooser):
    lengths = jnp.array([100, 3, 0], jnp.int32)
    table = jnp.arange(6, dtype=jnp.int32).reshape(3, 2)
    batch = make_batch(lengths, jnp.ones(3, jnp.int32), table, num_tokens=3, page_size=64)
    positions = np.asarray(floor_positions(batch, SMALL, chooser))
    chosen = [sorted(row[row >= 0]) for row in positions]
    assert chosen[1:] == [[0, 1, 2], []]
    assert len(set(chosen[0])) == 64 and 99 in chosen[0] and max(chosen[0]) == 99
    assert (chosen[0] == list(range(36, 100))) == (chooser == "last")
