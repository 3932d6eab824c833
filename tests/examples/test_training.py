"""The recipe's losses, and the data they are trained on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.byte_lm import ByteLMConfig, init_params, load_params, save_params
from examples.corpus import HELD_OUT, held_out_windows, is_held_out, training_corpus
from examples.generation import new_caches, prefill_chunk
from examples.train import is_index_parameter, make_optimizer
from examples.training import losses
from jmla import Config, KVLayout, resolve

CONFIG = ByteLMConfig(
    mla=dataclasses.replace(ByteLMConfig().mla, index_topk=8), layers=2, mlp_size=32
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 33), 0, 256)


@pytest.fixture(scope="module")
def params():
    return init_params(jax.random.key(0), CONFIG)


def loss(params, stage, config=CONFIG):
    return losses(params, config, TOKENS, stage=stage, attention="xla", query_chunk=16)


def test_warmup_computes_the_dense_model(params):
    dense, nothing = loss(params, "dense")
    warm, divergence = loss(params, "warmup")
    assert float(nothing) == 0.0 and float(divergence) > 0.0
    np.testing.assert_allclose(dense, warm, rtol=1e-5)


def test_sparse_with_a_wide_choice_is_dense(params):
    wide = dataclasses.replace(CONFIG, mla=dataclasses.replace(CONFIG.mla, index_topk=32))
    np.testing.assert_allclose(loss(params, "sparse", wide), loss(params, "warmup"), rtol=1e-5)
    assert abs(float(loss(params, "sparse")[0] - loss(params, "dense")[0])) > 1e-5


def test_fp4_latents_cost_something_and_pass_gradients(params):
    def rounded(params, sequences):
        return losses(
            params,
            CONFIG,
            TOKENS,
            stage="sparse",
            attention="xla",
            fp4_sequences=sequences,
            query_chunk=16,
        )[0]

    exact, half, whole = (float(rounded(params, n)) for n in (0, 1, 2))
    assert exact == float(loss(params, "sparse")[0])
    assert len({exact, half, whole}) == 3 and abs(whole - exact) < 0.2
    gradient = jax.grad(rounded)(params, 2)
    assert bool(jnp.any(gradient["layers"][0]["attention"]["kv_down"] != 0))


def test_divergence_moves_the_indexer_alone(params):
    gradient = jax.grad(lambda p: loss(p, "warmup")[1])(params)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, g: bool(jnp.any(g != 0)) == is_index_parameter(path, g), gradient
    )
    assert all(jax.tree.leaves(moved))


def test_warmup_optimizer_freezes_the_model(params):
    optimizer = make_optimizer("warmup", 1e-3, 10)
    gradient = jax.tree.map(jnp.ones_like, params)
    with jax.numpy_dtype_promotion("standard"):  # optax's counters mix int and float
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        updates, _ = optimizer.update(gradient, state, params)  # the first step's rate is 0
    moved = jax.tree_util.tree_map_with_path(
        lambda path, u: bool(jnp.any(u != 0)) == is_index_parameter(path, u), updates
    )
    assert all(jax.tree.leaves(moved))


def test_training_and_serving_are_one_model(params):
    """The sparse loss with expanded heads equals the served model's, over a bf16 cache."""
    config = dataclasses.replace(CONFIG, mla=dataclasses.replace(CONFIG.mla, index_topk=64))
    plan = resolve(
        Config(
            num_heads=16,
            sm_scale=config.mla.sm_scale,
            layout=KVLayout.BF16,
            index_topk=64,
            page_size=16,
        )
    )
    caches, page_table = new_caches(plan, config, requests=1, context=48)
    _, logits = prefill_chunk(
        params,
        caches,
        page_table,
        jnp.zeros((1,), jnp.int32),
        jnp.full((1,), 32, jnp.int32),
        TOKENS[0, :-1],
        config=config,
        plan=plan,
    )
    nats = -jax.nn.log_softmax(logits)[jnp.arange(32), TOKENS[0, 1:]]
    trained, _ = losses(params, config, TOKENS[:1], stage="sparse", attention="xla", query_chunk=16)
    np.testing.assert_allclose(jnp.mean(nats), trained, rtol=5e-3)


def test_weights_survive_a_file(params, tmp_path):
    path = tmp_path / "folder" / "w.safetensors"
    save_params(path, params, {"seed": "0"})
    loaded, metadata = load_params(path, CONFIG)
    assert metadata == {"seed": "0"}
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(jnp.bfloat16), b), params, loaded
    )


def test_held_out_modules_are_not_trained_on():
    corpus = training_corpus()
    assert len(corpus.files) > 100 and not set(corpus.files) & set(HELD_OUT)
    assert not any(is_held_out(path) for path in corpus.files)
    assert (
        is_held_out("test/test_argparse.py")
        and is_held_out("test/test_json/test_decode.py") is False
    )
    assert is_held_out("test/test_statistics.py") and not is_held_out("test/test_os.py")
    assert (corpus.data == 0).sum() == len(corpus.files)


def test_windows_are_whole_and_disjoint():
    windows = held_out_windows(5121, 16)
    assert windows.shape == (16, 5121) and windows.dtype == np.uint8
    assert len({window.tobytes() for window in windows}) == 16
    with pytest.raises(ValueError, match="ask for fewer"):
        held_out_windows(100_000_000, 1)


def test_a_folder_without_a_library_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"argparse\.py is missing"):
        training_corpus(tmp_path)
