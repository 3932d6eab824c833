"""The README against what it describes."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import jmla

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_support_table_is_the_generated_one():
    generated = (ROOT / "docs" / "attention_backends.md").read_text()
    table = re.search(r"\| layout \| prefill \| decode \|\n(?:\|.*\n)+", generated)
    assert table and table.group(0) in README


def test_accuracy_figures_are_the_measured_ones():
    rows = json.loads((ROOT / "docs" / "accuracy" / "accuracy.json").read_text())["rows"]
    bf16 = next(row["decode_bits"] for row in rows if row["name"] == "BF16")
    measured = {
        (str(row["bytes_per_token"]), f"{row['decode_bits']:.4f}"): row["decode_bits"] / bf16 - 1
        for row in rows
    }
    pattern = r"\| (\d+) \| (\d\.\d{4}) \| ([+-]\d+\.\d\d %)? ?\|"
    quoted = {(size, bits): change for size, bits, change in re.findall(pattern, README)}
    assert quoted.keys() == measured.keys()
    for case, change in quoted.items():
        assert change == (f"{measured[case] * 100:+.2f} %" if measured[case] else "")


def test_speeds_are_the_recorded_ones():
    results = ROOT / "benchmarks" / "results" / "H200.jsonl"
    recorded = set()
    for record in map(json.loads, results.read_text().splitlines()):
        if record["op"] != "sparse_decode":
            continue
        words = [record["case"], record["scale_format"]]
        words += [record["indices"]] if record["indices"] != "uniform" else []
        name = " ".join(word for word in words if word)
        ours, peer, floor = record["ours_us"], record["peer_us"], record["floor_us"]
        against = (f"{peer:.1f}", f"{peer / ours:.2f}") if peer else ("-", "-")
        shape = name.replace("layout=", "").replace(" topk=2048", "")
        recorded.add((shape, f"{ours:.1f}", *against, f"{floor:.1f}"))
    pattern = r"^\| ((?:656|576|bf16|fp4|584)\S* b=.*?) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$"
    quoted = re.findall(pattern, README, flags=re.MULTILINE)
    assert quoted
    assert set(quoted) <= recorded


def test_links_and_folders_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for folder in re.findall(r"^\| `([a-z_/]+/)` \|", README, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


@pytest.mark.parametrize("new_lens", [(1, 1), (3, 3)])
def test_the_lines_for_model_code_run(new_lens):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    T = sum(new_lens)
    lengths = jnp.array([70, 9], jnp.int32)
    first = lengths - jnp.array(new_lens, jnp.int32) + 1
    keys = iter(jax.random.split(jax.random.key(0), 5))
    given = {
        "T": T,
        "seq_lens": lengths,
        "new_lens": jnp.array(new_lens, jnp.int32),
        "page_table": jnp.array([[3, 1], [0, 7]], jnp.int32),
        "latents": jax.random.normal(next(keys), (T, 576)),
        "index_keys": jax.random.normal(next(keys), (T, 128)),
        "q_index": jax.random.normal(next(keys), (2, T // 2, 4, 128), jnp.bfloat16),
        "w_index": jax.random.normal(next(keys), (2, T // 2, 4)),
        "lengths": first[:, None] + jnp.arange(T // 2, dtype=jnp.int32)[None],
        "q": jax.random.normal(next(keys), (2, T // 2, 16, 576), jnp.bfloat16),
    }
    exec(code, given)  # the README is ours
    assert given["out"].shape == (2, T // 2, 16, 512)
    assert bool(jnp.isfinite(given["lse"]).all())
    assert isinstance(given["plan"], jmla.Plan)
