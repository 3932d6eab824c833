"""The benchmark of selections on tiny cases, timed by the host's clock."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import ops, select_topk
from benchmarks.select_topk import CASES, Case, draw
from tests.benchmarks.test_sparse_decode import KEYS, TIMER

TINY = Case(b=3, s_kv=200, topk=20, kind="few")


def test_case_names_are_unique_and_name_what_is_unusual():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {"b64-s_kv32768", "b64-s_kv131072-topk512", "b64-s_kv131072-equal"} <= set(names)


@pytest.mark.parametrize("kind", ["equal", "few", "ascending", "last_bits"])
def test_adversarial_scores(kind: select_topk.Kind):
    scores = np.asarray(draw(Case(2, 300, kind=kind), 0))
    distinct = {"equal": 1, "few": 12, "ascending": 600, "last_bits": 4}[kind]
    assert len(np.unique(scores)) <= distinct
    assert (np.diff(scores) >= 0).all() == (kind in ("equal", "ascending"))


def test_the_share_that_a_selection_misses():
    scores = np.array([5, 1, 4, 4, 4, 0], np.float32)
    missed = select_topk._share_missed
    assert missed(np.array([0, 2, 3]), scores) == 0
    assert missed(np.array([4, 0, 3]), scores) == 0
    assert missed(np.array([0, 1, 2]), scores) == pytest.approx(1 / 3)
    assert missed(np.array([2, 3, 4]), scores) == pytest.approx(1 / 3)


def test_the_command_writes_what_it_measures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ops, "TOPK_CASES", {TINY.name: TINY})
    monkeypatch.setattr(command, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(command, "MATMUL_SIZE", 64)
    monkeypatch.setattr(command, "TIMERS", {"wall": lambda: TIMER})
    monkeypatch.setattr(select_topk.Bench, "rotated_bytes", 1 << 12)
    path = tmp_path / "results.jsonl"
    arguments = f"select_topk --timer wall --implementation xla --no-peer --out {path}"
    assert command.main(arguments.split()) == 0
    line = json.loads(path.read_text())
    assert set(line) >= KEYS
    assert line["case"] == "b=3 topk=20 s_kv=200" and line["error"] == 0
    assert "speedup" in capsys.readouterr().out


def test_a_missing_peer_is_said_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SGLANG_OPS", raising=False)
    assert command.main(["select_topk", "--timer=wall"]) == 2
    assert "--no-peer" in capsys.readouterr().err
