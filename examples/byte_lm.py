"""A small byte-level language model on jmla's MLA layer: sizes, parameters, files.

Its latents are kernel-true (512 + 64 values a token), everything around them is small.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from jmla.model import MLAConfig, Rope, init_mla, rms_norm

Params = dict  # a nested dict of arrays: embed, unembed, final_norm, layers: list of dicts

VOCABULARY = 256
# Documents of the training text end in this byte, which no text contains.
END_OF_DOCUMENT = 0

BYTE_LM_ATTENTION = MLAConfig(
    hidden_size=256,
    num_heads=16,
    q_lora_rank=96,
    qk_nope_head_dim=32,
    v_head_dim=32,
    index_n_heads=4,
    index_topk=256,
    rope=Rope(theta=50000.0),
)


@dataclass(frozen=True, kw_only=True)
class ByteLMConfig:
    """Static sizes of the model.

    Attributes:
        mla: sizes of every layer's attention.
        layers: number of layers.
        mlp_size: inner width of the gated MLP.
        max_context: bytes the model was trained to see at once.
    """

    mla: MLAConfig = BYTE_LM_ATTENTION
    layers: int = 4
    mlp_size: int = 512
    max_context: int = 8192


def init_params(key: PRNGKeyArray, config: ByteLMConfig, *, dtype=jnp.float32) -> Params:
    """Random parameters; what writes to the residual stream starts small."""
    hidden = config.mla.hidden_size
    embed_key, unembed_key, *layer_keys = jax.random.split(key, 2 + config.layers)
    residual_scale = (2 * config.layers) ** -0.5

    def normal(k: PRNGKeyArray, shape: tuple[int, ...], scale: float) -> Array:
        return (jax.random.normal(k, shape) * scale).astype(dtype)

    def layer(k: PRNGKeyArray) -> Params:
        attention_key, gate_key, up_key, down_key = jax.random.split(k, 4)
        attention = init_mla(attention_key, config.mla, dtype=dtype)
        attention["out"] = (attention["out"] * residual_scale).astype(dtype)
        return {
            "attention_norm": jnp.ones((hidden,), dtype),
            "attention": attention,
            "mlp_norm": jnp.ones((hidden,), dtype),
            "mlp_gate": normal(gate_key, (hidden, config.mlp_size), hidden**-0.5),
            "mlp_up": normal(up_key, (hidden, config.mlp_size), hidden**-0.5),
            "mlp_down": normal(
                down_key, (config.mlp_size, hidden), config.mlp_size**-0.5 * residual_scale
            ),
        }

    return {
        "embed": normal(embed_key, (VOCABULARY, hidden), 1.0),
        "layers": [layer(k) for k in layer_keys],
        "final_norm": jnp.ones((hidden,), dtype),
        "unembed": normal(unembed_key, (hidden, VOCABULARY), hidden**-0.5),
    }


def mlp(layer: Params, config: ByteLMConfig, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """The gated MLP with its norm; what it adds to the residual stream."""
    x = rms_norm(x, layer["mlp_norm"], config.mla.norm_eps)
    return (jax.nn.silu(x @ layer["mlp_gate"]) * (x @ layer["mlp_up"])) @ layer["mlp_down"]


def read_out(params: Params, config: ByteLMConfig, x: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Logits of the next byte, f32."""
    x = rms_norm(x, params["final_norm"], config.mla.norm_eps)
    return jnp.matmul(x, params["unembed"], preferred_element_type=jnp.float32)


def _flat_names(params: Params) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def save_params(
    path: Path, params: Params, metadata: dict[str, str], *, dtype=jnp.bfloat16
) -> None:
    """Write `params` as safetensors with `metadata` (training command, data, losses)."""
    flat = {name: value.astype(dtype) for name, value in _flat_names(params).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(flat, path, metadata=metadata)


def load_params(
    path: Path, config: ByteLMConfig, *, dtype=jnp.bfloat16
) -> tuple[Params, dict[str, str]]:
    """Parameters and metadata of a file that `save_params` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or holds another model than `config` describes.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights file; train one with examples/train.py.")
    template = jax.eval_shape(lambda k: init_params(k, config), jax.random.key(0))
    expected = {name: value.shape for name, value in _flat_names(template).items()}
    try:
        with safe_open(path, framework="flax") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if found != expected:
                odd = sorted(set(found.items()) ^ set(expected.items()))[:4]
                raise ValueError(
                    f"{path}: holds another model than {config=}; first differences {odd}. "
                    "Train it again with examples/train.py, or give the matching file."
                )
            flat = {name: file.get_tensor(name).astype(dtype) for name in found}
            metadata = dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({error}).") from error
    return jax.tree.unflatten(jax.tree.structure(template), [flat[n] for n in expected]), metadata
