"""The benchmark of attention layers on tiny layers, timed by the host's clock."""

import pytest

from benchmarks import __main__ as command
from benchmarks import attention_layer, records
from benchmarks.attention_layer import CASES, DTYPES, Bench, Case
from benchmarks.attention_models import DeepSeekR1, Qwen3
from benchmarks.floors import Ceilings
from benchmarks.timing import WallTimer
from jmla.model.config import MLAConfig

TIMER = WallTimer(warmup=1, calls=2, cooldown_s=0.0)
CEILINGS = Ceilings(copy_gbps=4000.0, matmul_tflops=700.0)
ENVIRONMENT = records.Environment("2026-01-02T03:04:05+00:00", "NVIDIA H200", "jax 1", "abc")


class TinyMLA(DeepSeekR1):
    config = MLAConfig(hidden_size=32, num_heads=2, q_lora_rank=16, index_n_heads=0)
    hidden = 32


class TinyGQA(Qwen3):
    hidden, heads, kv_heads, head_dim = 32, 4, 2, 32


def test_case_names():
    assert CASES[0].name == "deepseek-r1-b128-s_kv4096"
    assert CASES[3].name == "qwen3-235b-b128-s_kv4096"


@pytest.mark.parametrize(("layer", "sizes"), [(TinyMLA, (1152, 324)), (TinyGQA, (256, 72))])
def test_a_tiny_layer(layer, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Fewer bits are fewer bytes and a larger error; the same cache twice has none."""
    monkeypatch.setattr(attention_layer, "MODELS", {"tiny": layer})
    bench = Bench(TIMER, CEILINGS, ENVIRONMENT, "xla", with_peer=False)
    failures: list[str] = []
    made = list(
        bench.run([Case("tiny", 2, 64)], DTYPES[::2], failed=lambda name, _: failures.append(name))
    )
    assert not failures
    assert tuple(record.bytes_per_token for record in made) == sizes
    bf16, fp4 = (record.error for record in made)
    assert bf16 < 1e-6 < 5e-3 < fp4 < 0.3
    assert all(record.bytes == 128 * record.bytes_per_token for record in made)
    assert all(record.ours_us > 0 and record.peer_us is None for record in made)


@pytest.mark.parametrize("option", ["--cases=b3", "--dtypes=int8"])
def test_unknown_names_are_refused(option: str, capsys: pytest.CaptureFixture[str]):
    assert command.main(["attention_layer", option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err
