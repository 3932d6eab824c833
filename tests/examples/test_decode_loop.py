"""The demo: its compiled loop, its streaming, and what it says about bad input."""

import dataclasses
import io
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from examples import decode_loop as demo
from examples.byte_lm import ByteLMConfig, init_params, load_params
from examples.generation import (
    DecodeState,
    decode_loop,
    new_caches,
    new_host_caches,
    prefill_chunk,
    sample,
)
from jmla import KVLayout

SMALL = ByteLMConfig(
    mla=dataclasses.replace(ByteLMConfig().mla, index_topk=16), layers=2, mlp_size=32
)


def options(*arguments):
    return demo.parse_arguments(list(arguments))


def compilations(jitted: Any) -> int:
    """How many programs a `jax.jit` function holds."""
    return jitted._cache_size()


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), SMALL)


def generate(
    params, *, tokens, prompt=b"def f(x):\n    return x\n" * 4, plan=None, temperature=1.0
):
    printed = io.StringIO()
    console = Console(file=printed)
    generated, timing = demo.generate(
        params,
        SMALL,
        plan or demo.make_plan(options(), SMALL),
        prompt,
        context=256,
        tokens=tokens,
        temperature=temperature,
        seed=3,
        console=console,
        progress_console=Console(file=io.StringIO()),
    )
    return generated, timing, printed.getvalue()


def test_the_shipped_model_writes_python(capsys):
    status = demo.main(["--tokens", "160", "--temperature", "0", "--context", "3400"])
    printed = capsys.readouterr().out
    assert status == 0
    for word in ("time to first token", "tokens/s", "bytes per token", "prefill", "decode"):
        assert word in printed
    config = ByteLMConfig()
    params, metadata = load_params(demo.WEIGHTS, config, dtype=jnp.float32)
    assert {"command", "stages", "held_out", "files", "sha256"} <= metadata.keys()
    assert demo.WEIGHTS.stat().st_size <= 12e6
    generated = printed[printed.index("if not self._length:") : printed.rindex("time to first")]
    assert "raise" in generated or "return" in generated
    assert "self." in generated
    del params


def test_one_compilation_and_a_donated_cache(params):
    plan = demo.make_plan(options(), SMALL)
    caches, page_table = new_caches(plan, SMALL, requests=2, context=64)
    stored = jnp.array([3, 0], jnp.int32)
    state = DecodeState(caches, stored, stored + 1, jax.random.key(0))
    heat = jnp.float32(0.5)
    before = compilations(decode_loop)
    for _ in range(3):
        leaf = state.caches[0]
        state, tokens = decode_loop(
            params, state, page_table, heat, steps=4, config=SMALL, plan=plan
        )
        assert jax.tree.leaves(leaf)[0].is_deleted()
    assert compilations(decode_loop) == before + 1
    assert tokens.shape == (4, 2)
    np.testing.assert_array_equal(state.seq_lens, [15, 12])


def test_the_loop_is_one_program_without_host_calls(params):
    plan = demo.make_plan(options(), SMALL)
    caches, page_table = new_caches(plan, SMALL, requests=1, context=64)
    zero = jnp.zeros((1,), jnp.int32)
    state = DecodeState(caches, zero, zero, jax.random.key(0))
    text = decode_loop.lower(
        params, state, page_table, jnp.float32(1.0), steps=8, config=SMALL, plan=plan
    ).as_text()
    assert "while" in text
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text


def test_generation_equals_prefilling_its_own_text(params):
    """Greedy decode step by step gives what one prefill over prompt and answer rates highest."""
    prompt = b"import os\n\n\ndef main():\n"
    generated, timing, _ = generate(params, tokens=20, prompt=prompt, temperature=0.0)
    assert len(generated) == 20 and timing.steps == demo.DECODE_CHUNK
    plan = demo.make_plan(options(), SMALL)
    caches, page_table = new_caches(plan, SMALL, requests=1, context=256)
    text = np.zeros(64, np.int32)
    count = len(prompt) + len(generated) - 1
    text[:count] = np.frombuffer((prompt + generated)[:-1], np.uint8)
    _, logits = prefill_chunk(
        params,
        caches,
        page_table,
        jnp.zeros((1,), jnp.int32),
        jnp.full((1,), count, jnp.int32),
        jnp.asarray(text),
        config=SMALL,
        plan=plan,
    )
    got = np.frombuffer(generated, np.uint8)
    rated = np.asarray(logits[len(prompt) - 1 : count])
    margin = rated.max(1) - rated[np.arange(20), got]
    assert margin.max() < 0.02


def test_the_chunk_length_of_a_prompt_does_not_matter(params, monkeypatch):
    texts = []
    for chunk in (16, 64, 512):
        monkeypatch.setattr(demo, "PREFILL_CHUNK", chunk)
        texts.append(generate(params, tokens=12, temperature=0.0)[0])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize("layout", demo.LAYOUTS)
def test_every_layout_generates(params, layout):
    plan = demo.make_plan(options("--layout", layout), SMALL)
    assert plan.layout is demo.LAYOUTS[layout]
    generated, _, printed = generate(params, tokens=5, plan=plan)
    assert len(generated) == 5 and printed


def test_mixed_backends_and_head_groups_generate(params):
    mixed = options(
        "--layout", "576", "--prefill-backend", "flashmla_kv", "--decode-backend", "trtllm"
    )
    plan = demo.make_plan(mixed, SMALL)
    assert plan.layout is KVLayout.FP8_NOPE_FP8_ROPE
    assert len(generate(params, tokens=3, plan=plan)[0]) == 3
    grouped = demo.make_plan(options("--heads-per-device", "4"), SMALL)
    whole = generate(params, tokens=6, temperature=0.0)[0]
    assert generate(params, tokens=6, plan=grouped, temperature=0.0)[0] == whole


@pytest.mark.parametrize("layout", ["bf16", "fp4"])
def test_rows_in_host_memory_give_the_same_text(params, layout):
    """80 bytes of prompt are more than the buffer of 32 rows, of which each step reads 16."""
    full, host = (
        demo.make_plan(options("--layout", layout, "--page-size", "16", *flag), SMALL)
        for flag in ([], ["--hisparse"])
    )
    assert host.config.hisparse is not None and "32 rows of a request" in str(host)
    texts = [generate(params, tokens=40, plan=plan, temperature=0.0)[0] for plan in (full, host)]
    assert texts[0] == texts[1] and len(texts[0]) == 40


def test_a_prompt_is_not_written_to_host_memory(params):
    plan = demo.make_plan(options("--hisparse"), SMALL)
    caches, page_table = new_host_caches(plan, SMALL, context=64)
    zero, text = jnp.zeros(1, jnp.int32), jnp.zeros(8, jnp.int32)
    with pytest.raises(ValueError, match=r"phase='prefill' .* expected a Cache"):
        prefill_chunk(params, caches, page_table, zero, zero + 8, text, config=SMALL, plan=plan)


def test_the_end_of_a_document_ends_the_text(params):
    silent = params | {"unembed": jnp.zeros_like(params["unembed"])}  # byte 0 wins every tie
    generated, timing, printed = generate(silent, tokens=50, temperature=0.0)
    assert generated == b"\0" and timing.steps == 0 and printed == "\n"


def test_sampling():
    logits = jnp.array([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]])
    np.testing.assert_array_equal(sample(logits, jax.random.key(0), jnp.float32(0.0)), [1, 0])
    drawn = [int(sample(logits[:1], jax.random.key(i), jnp.float32(1.0))[0]) for i in range(300)]
    share = np.bincount(drawn, minlength=3) / 300
    np.testing.assert_allclose(share, jax.nn.softmax(logits[0]), atol=0.08)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"caf\xe9 \xff", "not UTF-8"),
        (b"a\0b", "zero byte"),
        (b"x" * 4000, "4000 bytes of prompt, room for 3840"),
    ],
)
def test_bad_prompts_are_named(tmp_path, capsys, content, message):
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    assert demo.main(["--prompt-file", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-file", "no/such/file.txt"], "no/such/file.txt"),
        (["--weights", "no/such.safetensors"], "train one"),
        (["--weights", "pyproject.toml"], "not a safetensors file"),
        (["--heads-per-device", "3"], "divisor of the model's 16 heads"),
        (["--context", "9000"], "at most 8192"),
        (["--context", "100"], "more than --tokens"),
        (["--tokens", "0"], "at least 1"),
        (["--temperature", "nan"], "finite"),
        (["--layout", "fp4", "--decode-backend", "fa3"], "fa3"),
        (["--decode-backend", "tilelang"], "tilelang"),
        (["--page-size", "0"], "page_size"),
    ],
)
def test_bad_arguments_are_named(capsys, arguments, message):
    assert demo.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"import re\n")))
    assert demo.read_prompt("-", room=100) == b"import re\n"


def test_weights_of_another_model_are_refused():
    other = dataclasses.replace(ByteLMConfig(), mlp_size=64)
    with pytest.raises(ValueError, match="another model"):
        load_params(demo.WEIGHTS, other)
