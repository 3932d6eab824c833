"""What a user chooses: the sizes of the model, the cache and the backends. Nothing is decided here.

A `Config` is frozen and hashable, so it is static under jit. It accepts the serving engines' words,
checks that they make sense one by one, and leaves what they mean together to `jmla.resolve`.
"""

import dataclasses
import math
import numbers
import re

from jmla.layouts.base import KVLayout, ScaleFormat

KV_CACHE_DTYPES = ("auto", "bfloat16", "fp8_e4m3", "fp4_e2m1")
PLATFORMS = ("auto", "cpu", "rocm", "tpu")
IMPLEMENTATIONS = ("xla", "mosaic_gpu", "reference")
ATTENTION_KINDS = ("mla", "mha")
SCALE_FORMATS = ("pow2", "fp32")

_DTYPE_ALIASES = (("bf16", "bfloat16"), ("fp4_mx_block16", "fp4_e2m1"))
_DTYPES_OF_ENGINES = (
    ("fp8_e5m2", "two bits of mantissa are too few for latents"),
    ("nvfp4", "its e4m3 block scales are no layout of jmla"),
    ("mxfp4", "blocks of 32 are no layout of jmla"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiSparseConfig:
    """Sizes of a cache that lives in host memory with a small buffer per request on the device.

    Attributes:
        top_k: positions attended per query; None takes the model's `index_topk`, which wins over
            another value given here.
        device_buffer_size: rows of one request's device buffer; None is twice the top-k.
        host_to_device_ratio: tokens that host memory holds per token of device memory.
        swap_in_block_size: threads of the block that swaps one request's rows in, 1 to 1024, as
            serving engines write it; the kernel here chooses by the sizes.

    Raises:
        ValueError: for a value out of range, naming each.
    """

    top_k: int | None = None
    device_buffer_size: int | None = None
    host_to_device_ratio: int = 2
    swap_in_block_size: int = 960

    def __post_init__(self) -> None:
        problems = []
        for name in ("top_k", "device_buffer_size", "host_to_device_ratio", "swap_in_block_size"):
            problems += _int_problems(
                name, getattr(self, name), none=name in ("top_k", "device_buffer_size")
            )
        if not problems and self.swap_in_block_size > 1024:
            problems.append(f"{self.swap_in_block_size=}: expected 1 to 1024")
        both = self.device_buffer_size is not None and self.top_k is not None
        if not problems and both and self.buffer_rows(self.top_k or 0) < (self.top_k or 0):
            problems.append(
                f"{self.device_buffer_size=}: expected at least {self.top_k=}, or a step's rows "
                "do not fit in the buffer"
            )
        raise_if("HiSparseConfig", problems)

    def buffer_rows(self, index_topk: int) -> int:
        """Rows of one request's device buffer, for a model that attends to `index_topk`."""
        return 2 * index_topk if self.device_buffer_size is None else self.device_buffer_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything `jmla.resolve` decides from.

    Attributes:
        num_heads: query heads on one device.
        sm_scale: factor of `q . k` before the softmax. Required: models disagree about it.
        kv_cache_dtype: "auto", "bfloat16" (or "bf16"), "fp8_e4m3", "fp4_e2m1" (or
            "fp4_mx_block16"). "auto" takes what the platform and the named backends call for.
        layout: pins the cache layout; None derives it from `kv_cache_dtype` and the backends.
            The only way to FP8_V4, and to a layout that no default leads to.
        prefill_backend: contract name of the prefill path; None takes the default.
        decode_backend: contract name of the decode path; None takes the default.
        page_size: tokens per page of the cache.
        index_topk: positions that the selection gives each query.
        kv_lora_rank: no-position values of a latent.
        rope_dim: rotary values of a latent.
        scale_format: which numbers the scales of a block-scale cache may be: "pow2" (FlashMLA's
            rule) or "fp32" (SGLang's).
        attention: "mla" or "mha"; "mha" is known so that a refusal can say what to do: a
            `GQAConfig` describes it.
        index_head_dim: length of an index key; None keeps no index keys in the cache.
        index_hadamard: whether index keys and queries are rotated by a Hadamard matrix before they
            are quantised.
        attn_sink: whether each head has a learned attention sink.
        hisparse: sizes of a host-resident cache; None keeps the cache on the device.
        platform: "auto" (the machine's), "cpu", "rocm", "tpu" or an NVIDIA architecture: "sm_90".
        implementation: "xla", "mosaic_gpu", "reference", for both phases; None is the best one
            that serves each.
        num_splits: parts the key axis of sparse decode is cut in; None lets the op choose. A fixed
            number makes a row's bits independent of its batch.

    Raises:
        ValueError: naming every value that is not one of the accepted ones.
    """

    num_heads: int
    sm_scale: float
    kv_cache_dtype: str = "auto"
    layout: KVLayout | None = None
    prefill_backend: str | None = None
    decode_backend: str | None = None
    page_size: int = 64
    index_topk: int = 2048
    kv_lora_rank: int = 512
    rope_dim: int = 64
    scale_format: ScaleFormat = "pow2"
    attention: str = "mla"
    index_head_dim: int | None = 128
    index_hadamard: bool = False
    attn_sink: bool = False
    hisparse: HiSparseConfig | None = None
    platform: str = "auto"
    implementation: str | None = None
    num_splits: int | None = None

    def __post_init__(self) -> None:
        canonical = dict(_DTYPE_ALIASES).get(self.kv_cache_dtype, self.kv_cache_dtype)
        object.__setattr__(self, "kv_cache_dtype", canonical)
        problems = [
            *_int_problems("num_heads", self.num_heads),
            *_sm_scale_problems(self.sm_scale),
            *_kv_cache_dtype_problems(self.kv_cache_dtype),
            *_int_problems("page_size", self.page_size),
            *_int_problems("index_topk", self.index_topk),
            *_int_problems("kv_lora_rank", self.kv_lora_rank),
            *_int_problems("rope_dim", self.rope_dim, least=0),
            *_choice_problems("scale_format", self.scale_format, SCALE_FORMATS),
            *_choice_problems("attention", self.attention, ATTENTION_KINDS),
            *_int_problems("index_head_dim", self.index_head_dim, none=True),
            *_platform_problems(self.platform),
            *_int_problems("num_splits", self.num_splits, none=True),
        ]
        if self.implementation is not None:
            problems += _choice_problems(
                "implementation", self.implementation, (None, *IMPLEMENTATIONS)
            )
        if self.layout is not None and not isinstance(self.layout, KVLayout):
            names = ", ".join(f"KVLayout.{layout.name}" for layout in KVLayout)
            problems.append(f"{self.layout=}: expected None or one of {names}")
        problems += _backend_problems(self)
        if not isinstance(self.index_hadamard, bool):
            problems.append(f"{self.index_hadamard=}: expected True or False")
        if not isinstance(self.attn_sink, bool):
            problems.append(
                f"{self.attn_sink=}: expected True or False; the sink's values are an argument of "
                "the plan's methods"
            )
        if self.hisparse is not None and not isinstance(self.hisparse, HiSparseConfig):
            problems.append(f"{self.hisparse=}: expected None or a HiSparseConfig")
        raise_if("Config", problems)
        # 1 and 1.0 are equal, but only one of them is a float to JAX.
        object.__setattr__(self, "sm_scale", float(self.sm_scale))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """What `jmla.resolve` decides from for attention over keys and values of several heads.

    Attributes:
        num_heads: query heads on one device.
        num_kv_heads: heads of the cache on one device, a divisor of `num_heads`: as many for MHA.
        sm_scale: factor of `q . k` before the softmax. Required, as in `Config`.
        head_dim: values of a key, and of a value.
        kv_cache_dtype: as in `Config`; "auto" is "bfloat16".
        prefill_backend: known so that a refusal can say what to do; jmla has no such prefill.
        decode_backend: contract name of the decode path; None takes the default.
        page_size: tokens per page of the cache.
        platform: as in `Config`.
        implementation: as in `Config`.
        num_splits: parts the positions are cut in; None lets the op choose. A fixed number makes a
            request's bits independent of its batch.

    Raises:
        ValueError: naming every value that is not one of the accepted ones.
    """

    num_heads: int
    num_kv_heads: int
    sm_scale: float
    head_dim: int = 128
    kv_cache_dtype: str = "auto"
    prefill_backend: str | None = None
    decode_backend: str | None = None
    page_size: int = 64
    platform: str = "auto"
    implementation: str | None = None
    num_splits: int | None = None

    def __post_init__(self) -> None:
        canonical = dict(_DTYPE_ALIASES).get(self.kv_cache_dtype, self.kv_cache_dtype)
        object.__setattr__(self, "kv_cache_dtype", canonical)
        problems = [
            *_int_problems("num_heads", self.num_heads),
            *_int_problems("num_kv_heads", self.num_kv_heads),
            *_sm_scale_problems(self.sm_scale),
            *_int_problems("head_dim", self.head_dim),
            *_kv_cache_dtype_problems(self.kv_cache_dtype),
            *_int_problems("page_size", self.page_size),
            *_platform_problems(self.platform),
            *_choice_problems("implementation", self.implementation, (None, *IMPLEMENTATIONS)),
            *_int_problems("num_splits", self.num_splits, none=True),
            *_backend_problems(self),
        ]
        if not problems and self.num_heads % self.num_kv_heads:
            problems.append(
                f"{self.num_heads=} {self.num_kv_heads=}: expected a multiple of num_kv_heads"
            )
        raise_if("GQAConfig", problems)
        object.__setattr__(self, "sm_scale", float(self.sm_scale))


def raise_if(subject: str, problems: list[str]) -> None:
    """Raises ValueError with every problem, one a line, if there is any."""
    if problems:
        raise ValueError(f"{subject} cannot be used:\n" + "\n".join(f"- {p}" for p in problems))


def quote(values: tuple[object, ...]) -> str:
    """The values as a reader would write them: `'a', 'b' or None`."""
    words = [repr(value) if not isinstance(value, KVLayout) else str(value) for value in values]
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _int_problems(name: str, value: object, *, least: int = 1, none: bool = False) -> list[str]:
    if value is None and none:
        return []
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and value >= least:  # type: ignore[operator]
        return []
    return [f"{name}={value!r}: expected {'None or ' * none}a whole number, at least {least}"]


def _backend_problems(config: Config | GQAConfig) -> list[str]:
    names = ("prefill_backend", "decode_backend")
    return [
        f"{name}={getattr(config, name)!r}: expected None or the name of a backend"
        for name in names
        if not isinstance(getattr(config, name), str | None)
    ]


def _choice_problems(name: str, value: object, accepted: tuple[object, ...]) -> list[str]:
    return [] if value in accepted else [f"{name}={value!r}: expected {quote(accepted)}"]


def _sm_scale_problems(value: object) -> list[str]:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if number and math.isfinite(value) and value > 0:  # type: ignore[arg-type, operator]
        return []
    return [
        f"sm_scale={value!r}: expected a finite positive Python number, such as "
        "(qk_nope_head_dim + qk_rope_head_dim) ** -0.5; it is static, so no array"
    ]


def _kv_cache_dtype_problems(value: object) -> list[str]:
    if value in KV_CACHE_DTYPES:
        return []
    why = dict(_DTYPES_OF_ENGINES).get(value) if isinstance(value, str) else None
    reason = f" ({why})" if why else ""
    aliases = " and ".join(f"{alias!r} for {name!r}" for alias, name in _DTYPE_ALIASES)
    return [
        f"kv_cache_dtype={value!r}{reason}: expected {quote(KV_CACHE_DTYPES)}; the aliases "
        f"{aliases} work too"
    ]


def _platform_problems(value: object) -> list[str]:
    known = value in PLATFORMS or (isinstance(value, str) and re.fullmatch(r"sm_\d{2,3}", value))
    if known:
        return []
    return [
        f"platform={value!r}: expected {quote(PLATFORMS)}, or an NVIDIA architecture such as "
        "'sm_90' (Hopper) or 'sm_100' (Blackwell)"
    ]
