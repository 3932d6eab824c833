"""The absorbed layer against attention with expanded keys and values, dense and chosen."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmla import Cache, Config, KVLayout, make_batch, resolve
from jmla.model import (
    MLAConfig,
    Rope,
    choose_positions,
    init_mla,
    layer,
    mla_attention,
    project,
)
from tests.helpers import assert_close

CONFIG = MLAConfig(
    hidden_size=48,
    num_heads=4,
    q_lora_rank=24,
    kv_lora_rank=128,
    qk_nope_head_dim=16,
    qk_rope_head_dim=64,
    v_head_dim=16,
    index_n_heads=2,
    index_topk=8,
    rope=Rope(theta=1000.0),
)
PAGE = 4


def plan_for(config=CONFIG, *, heads=4, **changes):
    base = Config(
        num_heads=heads,
        sm_scale=config.sm_scale,
        layout=KVLayout.BF16,
        page_size=PAGE,
        index_topk=config.index_topk,
        kv_lora_rank=config.kv_lora_rank,
        rope_dim=config.qk_rope_head_dim,
        index_head_dim=config.index_head_dim if config.index_n_heads else None,
    )
    return resolve(dataclasses.replace(base, **changes))


def positions_of(attended):
    assert attended.positions is not None
    return np.sort(attended.positions)


def problem(length, config=CONFIG, seed=0):
    params_key, x_key = jax.random.split(jax.random.key(seed))
    params = init_mla(params_key, config, dtype=jnp.float32)
    return params, jax.random.normal(x_key, (length, config.hidden_size))


def batch_of(seq_lens, new_lens, pages, *, num_tokens=None):
    table = jnp.arange(len(seq_lens) * pages, dtype=jnp.int32)[::-1].reshape(len(seq_lens), pages)
    return make_batch(
        jnp.array(seq_lens, jnp.int32),
        jnp.array(new_lens, jnp.int32),
        table,
        num_tokens=sum(new_lens) if num_tokens is None else num_tokens,
        page_size=PAGE,
    )


def expanded_attention(params, config, x, visible):
    """The layer in f64 with a key and a value for every head; `visible` bool [t, t]."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    positions = jnp.arange(x.shape[0], dtype=jnp.int32)
    projected = project(params, config, x, positions)
    latents = np.asarray(projected.latents.astype(jnp.bfloat16), np.float64)
    nope, rope = np.split(latents, [config.kv_lora_rank], axis=1)
    q_nope, q_rope = (
        np.asarray(a, np.float64) for a in (projected.query_nope, projected.query_rope)
    )
    scores = np.einsum("thd,shd->hts", q_nope, np.einsum("sr,hdr->shd", nope, p["k_up"]))
    scores += np.einsum("thd,sd->hts", q_rope, rope)
    scores = np.where(visible, scores * config.sm_scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    values = np.einsum("sr,hrv->shv", nope, p["v_up"])
    return np.einsum("hts,shv,hvd->td", weights, values, p["out"])


def causal(length):
    return np.tril(np.ones((length, length), bool))


def chosen(positions, length):
    visible = np.zeros((length, length), bool)
    for row, those in enumerate(np.asarray(positions)):
        visible[row, those[those >= 0]] = True
    return visible


CLOSE = {"abs_tol": 0.03, "rel_tol": 0.02}


@pytest.mark.parametrize("length", [1, 7, 20])
def test_prefill_is_expanded_attention_over_the_chosen(length):
    params, x = problem(length)
    plan = plan_for()
    attended = mla_attention(
        params,
        CONFIG,
        plan,
        x,
        plan.init_cache(6),
        batch_of([length], [length], 6),
        phase="prefill",
    )
    assert positions_of(attended).shape == (length, CONFIG.index_topk)
    visible = chosen(attended.positions, length)
    assert (visible <= causal(length)).all()
    np.testing.assert_array_equal(visible.sum(1), np.minimum(np.arange(length) + 1, 8))
    assert_close(attended.out, expanded_attention(params, CONFIG, x, visible), **CLOSE)


def test_dense_plan_needs_no_indexer():
    config = dataclasses.replace(CONFIG, index_n_heads=0)
    params, x = problem(11, config)
    assert not any(name.startswith("index_") for name in params)
    dense = plan_for(config, prefill_backend="flashmla", decode_backend="flashmla", page_size=64)
    batch = make_batch(
        jnp.array([11], jnp.int32),
        jnp.array([11], jnp.int32),
        jnp.array([[1]], jnp.int32),
        num_tokens=11,
        page_size=64,
    )
    attended = mla_attention(params, config, dense, x, dense.init_cache(2), batch, phase="prefill")
    assert attended.positions is None and attended.cache.index_keys is None
    assert_close(attended.out, expanded_attention(params, config, x, causal(11)), **CLOSE)


@pytest.mark.parametrize("layout", list(KVLayout))
def test_decode_continues_prefill(layout):
    params, x = problem(18)
    plan = plan_for(layout=layout)
    whole = mla_attention(
        params, CONFIG, plan, x, plan.init_cache(6), batch_of([18], [18], 6), phase="prefill"
    )
    cache = plan.init_cache(6)
    first = mla_attention(
        params, CONFIG, plan, x[:15], cache, batch_of([15], [15], 6), phase="prefill"
    )
    cache, outs = first.cache, []
    for i in range(15, 18):
        step = mla_attention(
            params, CONFIG, plan, x[i : i + 1], cache, batch_of([i + 1], [1], 6), phase="decode"
        )
        cache = step.cache
        outs.append(step.out)
        np.testing.assert_array_equal(positions_of(step), positions_of(whole)[i : i + 1])
    assert_close(jnp.concatenate(outs), whole.out[15:], **CLOSE)


def test_draft_tokens_are_causal_among_themselves():
    params, x = problem(12)
    plan = plan_for()
    whole = mla_attention(
        params, CONFIG, plan, x, plan.init_cache(6), batch_of([12], [12], 6), phase="prefill"
    )
    first = mla_attention(
        params, CONFIG, plan, x[:9], plan.init_cache(6), batch_of([9], [9], 6), phase="prefill"
    )
    drafts = mla_attention(
        params, CONFIG, plan, x[9:], first.cache, batch_of([12], [3], 6), phase="decode"
    )
    assert_close(drafts.out, whole.out[9:], **CLOSE)


def test_requests_do_not_see_each_other_and_padding_writes_nothing():
    params, x = problem(9)
    plan = plan_for()
    alone = mla_attention(
        params, CONFIG, plan, x[:5], plan.init_cache(8), batch_of([5], [5], 4), phase="prefill"
    )
    padded = jnp.concatenate([x, jnp.full((3, CONFIG.hidden_size), jnp.nan)])
    both = mla_attention(
        params,
        CONFIG,
        plan,
        padded,
        plan.init_cache(8),
        batch_of([5, 4], [5, 4], 4, num_tokens=12),
        phase="prefill",
    )
    assert_close(both.out[:5], alone.out, abs_tol=1e-5, rel_tol=1e-5)
    used = 9
    assert isinstance(both.cache, Cache)
    assert int(jnp.sum(jnp.any(both.cache.rows.flat().dequantize() != 0, axis=-1))) == used
    assert not bool(jnp.isnan(both.cache.rows.dequantize()).any())


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_in_groups_are_the_same_heads(heads):
    params, x = problem(10)
    outs = []
    for per_device in (4, heads):
        plan = plan_for(heads=per_device)
        attended = mla_attention(
            params, CONFIG, plan, x, plan.init_cache(4), batch_of([10], [10], 4), phase="prefill"
        )
        outs.append(attended.out)
    np.testing.assert_array_equal(outs[0], outs[1])


def test_given_positions_are_used():
    params, x = problem(10)
    plan = plan_for()
    last = jnp.maximum(jnp.arange(10, dtype=jnp.int32)[:, None] - jnp.arange(3)[None], -1)
    last = last.astype(jnp.int32)
    attended = mla_attention(
        params,
        CONFIG,
        plan,
        x,
        plan.init_cache(4),
        batch_of([10], [10], 4),
        phase="prefill",
        positions=last,
    )
    want = expanded_attention(params, CONFIG, x, chosen(last, 10))
    assert_close(attended.out, want, **CLOSE)


def test_indexer_rates_as_written_down():
    params, x = problem(16)
    plan = plan_for()
    batch = batch_of([16], [16], 4)
    attended = mla_attention(params, CONFIG, plan, x, plan.init_cache(4), batch, phase="prefill")
    indexer = project(params, CONFIG, x, batch.token_position).indexer
    assert indexer is not None
    q, w, k = (np.asarray(a, np.float64) for a in (indexer.queries, indexer.weights, indexer.keys))
    rating = np.einsum("hts,th->ts", np.maximum(np.einsum("thd,sd->hts", q, k), 0.0), w)
    by_page = choose_positions(
        jax.tree.map(lambda a: a[15:], indexer),
        attended.cache,
        batch_of([16], [1], 4),
        8,
        phase="decode",
    )
    np.testing.assert_array_equal(np.sort(by_page), positions_of(attended)[15:])
    best = np.argsort(-rating[15])[:8]
    # fp8 may swap neighbours in rank; most of the choice must agree.
    assert len(set(best) & set(np.asarray(by_page)[0])) >= 6


def test_on_a_hopper_one_kernel_normalises_rotates_and_appends(monkeypatch):
    params, x = problem(3)
    plan, batch = plan_for(), batch_of([3], [1], 4)
    monkeypatch.setattr("jmla._implementation.on_hopper", lambda: True)
    step = functools.partial(mla_attention, params, CONFIG, plan, phase="decode")
    jaxpr = str(jax.make_jaxpr(step)(x[2:], plan.init_cache(4), batch))
    assert jaxpr.count("name=cache_codec") == 1


@pytest.mark.usefixtures("hopper")
def test_the_kernel_appends_what_xla_does(monkeypatch):
    params, x = problem(24)
    plan, batch = plan_for(), batch_of([24], [24], 4)
    run = jax.jit(functools.partial(mla_attention, params, CONFIG, plan, phase="prefill"))
    assert "cache_codec" in str(run.lower(x, plan.init_cache(8), batch).compile().as_text())
    ours = run(x, plan.init_cache(8), batch)
    monkeypatch.setattr("jmla._implementation.on_hopper", lambda: False)
    run = jax.jit(functools.partial(mla_attention, params, CONFIG, plan, phase="prefill"))
    assert "cache_codec" not in str(run.lower(x, plan.init_cache(8), batch).compile().as_text())
    theirs = run(x, plan.init_cache(8), batch)
    assert_close(ours.cache.rows.latents, theirs.cache.rows.latents, **CLOSE)


def test_tokens_choose_alike_however_many_at_a_time(monkeypatch: pytest.MonkeyPatch):
    params, x = problem(13)
    plan, batch = plan_for(), batch_of([13], [13], 4)

    def positions() -> np.ndarray:
        cache = plan.init_cache(4)
        return positions_of(mla_attention(params, CONFIG, plan, x, cache, batch, phase="prefill"))

    at_once = positions()
    # The page table has room for 16: five tokens at a time, and two entries of padding.
    monkeypatch.setattr(layer, "_MOST_LOGITS", 5 * 16)
    np.testing.assert_array_equal(positions(), at_once)


def test_gradients_reach_every_parameter_but_the_indexer_is_detached():
    params, x = problem(6)

    def loss(params, x):
        projected = project(params, CONFIG, x, jnp.arange(6, dtype=jnp.int32))
        return sum(jnp.sum(jnp.square(a)) for a in jax.tree.leaves(projected.indexer))

    gradients, to_x = jax.grad(loss, argnums=(0, 1))(params, x)
    moved = {name for name, g in gradients.items() if bool(jnp.any(g != 0))}
    assert moved == {"index_q", "index_k", "index_w", "index_k_gain", "index_k_bias"}
    assert not bool(jnp.any(to_x != 0))


def test_refusals_say_what_to_do():
    params, x = problem(4)
    plan = plan_for(heads=3)
    batch = batch_of([4], [4], 1)
    with pytest.raises(ValueError, match=r"num_heads=4.*num_heads=3.*multiple"):
        mla_attention(params, CONFIG, plan, x, plan.init_cache(1), batch, phase="prefill")
    with pytest.raises(ValueError, match=r"x\.shape.*expected \[tokens, 48\]"):
        project(params, CONFIG, x[:, :7], jnp.arange(4, dtype=jnp.int32))
    with pytest.raises(ValueError, match=r"qk_rope_head_dim=63.*even"):
        dataclasses.replace(CONFIG, qk_rope_head_dim=63)
    without = dataclasses.replace(CONFIG, index_n_heads=0)
    params, x = problem(4, without)
    sparse = plan_for(without)
    with pytest.raises(ValueError, match="pass positions, or take a dense backend"):
        mla_attention(params, without, sparse, x, sparse.init_cache(1), batch, phase="prefill")
