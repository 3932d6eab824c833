"""The ops that `python -m benchmarks` times: the options of each, and how it starts."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from benchmarks import (
    attention_layer,
    cache,
    cache_peer,
    decode_step,
    dense_decode,
    dense_prefill,
    hisparse,
    indexer_logits,
    peers,
    records,
    select_topk,
    sparse_decode,
    sparse_prefill,
)
from benchmarks.deep_gemm import DeepGEMM
from benchmarks.inputs import IN_PLACE, LAYOUTS
from benchmarks.timing import TIMERS
from jmla._mosaic_cache import CacheImplementation
from jmla.attention import Implementation
from jmla.hisparse import HiSparseImplementation
from jmla.layouts import ScaleFormat

SIZES = sparse_decode.Sizes()

# Measures cases, with a timer, ceilings, an environment and what to do with one that fails.
Start = Callable[..., Iterator[Any]]

CASES = {case.name: case for case in sparse_decode.CASES}
DENSE_CASES = {case.name: case for case in dense_decode.CASES}
DENSE_PREFILL_CASES = {case.name: case for case in dense_prefill.CASES}
PREFILL_CASES = {case.name: case for case in sparse_prefill.CASES}
TOPK_CASES = {case.name: case for case in select_topk.CASES}
LOGITS_CASES = {case.name: case for case in indexer_logits.CASES}
LAYER_CASES = {case.name: case for case in attention_layer.CASES}
STEP_CASES = {case.name: case for case in decode_step.CASES}
CACHE_OPS = {case.op: case.op for case in cache.CASES}
HISPARSE_OPS = {case.op: case.op for case in hisparse.CASES}
NAMES = {name: name for name in (*LAYOUTS, *IN_PLACE)}
SCALE_FORMATS: dict[str, ScaleFormat] = {name: name for name in get_args(ScaleFormat)}


def parse_arguments(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, of a program that does what is described."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ops = parser.add_subparsers(dest="op", required=True)
    op = ops.add_parser("sparse_decode", help=sparse_decode.__doc__)
    op.add_argument("--cases", default=",".join(CASES), help="names (default: %(default)s)")
    op.add_argument(
        "--layouts",
        default="656",
        help=f"of {','.join(NAMES)} (default: %(default)s, the one that the peer reads)",
    )
    op.add_argument(
        "--scale-formats",
        default=",".join(SCALE_FORMATS),
        help="of layouts 656 and 656-packed (default: %(default)s)",
    )
    op.add_argument("--implementation", choices=get_args(Implementation), default="mosaic_gpu")
    _add_common(op, "FlashMLA over these; needs PyTorch and sgl-flash-mla")
    op = ops.add_parser("dense_decode", help=dense_decode.__doc__)
    op.add_argument("--cases", default=",".join(DENSE_CASES), help="names (default: %(default)s)")
    op.add_argument(
        "--layouts",
        default="bf16",
        help=f"of {','.join(LAYOUTS)} (default: %(default)s, the one that the peer reads)",
    )
    op.add_argument("--implementation", choices=get_args(Implementation), default="mosaic_gpu")
    _add_common(op, "FlashMLA over bf16; needs PyTorch and sgl-flash-mla")
    op = ops.add_parser("dense_prefill", help=dense_prefill.__doc__)
    op.add_argument(
        "--cases", default=",".join(DENSE_PREFILL_CASES), help="names (default: %(default)s)"
    )
    op.add_argument("--implementation", choices=get_args(Implementation), default="mosaic_gpu")
    _add_common(op, "nothing: both ways are always timed")
    op.set_defaults(peer=False)
    op = ops.add_parser("sparse_prefill", help=sparse_prefill.__doc__)
    op.add_argument("--cases", default=",".join(PREFILL_CASES), help="names (default: %(default)s)")
    op.add_argument(
        "--layouts",
        default="bf16",
        help=f"of {','.join(LAYOUTS)} (default: %(default)s; the peer reads 656, too)",
    )
    op.add_argument(
        "--ways",
        default="direct",
        help="of direct,gather: reads rows in place, or copies of them in bf16 that it makes "
        "first (default: %(default)s)",
    )
    op.add_argument("--implementation", choices=get_args(Implementation), default="mosaic_gpu")
    _add_common(op, "FlashMLA over bf16 or 656; needs PyTorch and sgl-flash-mla")
    op = ops.add_parser("select_topk", help=select_topk.__doc__)
    op.add_argument("--cases", default=",".join(TOPK_CASES), help="names (default: %(default)s)")
    op.add_argument("--implementation", choices=("mosaic_gpu", "xla"), default="mosaic_gpu")
    _add_common(op, "SGLang's fast_topk; needs PyTorch and sglang-kernel's library")
    op = ops.add_parser("indexer_logits", help=indexer_logits.__doc__)
    op.add_argument("--cases", default=",".join(LOGITS_CASES), help="names (default: %(default)s)")
    op.add_argument("--implementation", choices=("mosaic_gpu", "xla"), default="mosaic_gpu")
    _add_common(op, "DeepGEMM; needs PyTorch, sgl-deep-gemm and CUDA's compiler")
    op = ops.add_parser("decode_step", help=decode_step.__doc__)
    op.add_argument("--cases", default=",".join(STEP_CASES), help="names (default: %(default)s)")
    op.add_argument("--implementation", choices=("mosaic_gpu", "xla"), default="mosaic_gpu")
    _add_common(op, "DeepGEMM, SGLang's selection and FlashMLA, which need PyTorch")
    op = ops.add_parser("attention_layer", help=attention_layer.__doc__)
    op.add_argument("--cases", default=",".join(LAYER_CASES), help="names (default: %(default)s)")
    op.add_argument(
        "--dtypes",
        default=",".join(attention_layer.DTYPES),
        help="of caches (default: %(default)s)",
    )
    op.add_argument("--implementation", choices=get_args(Implementation), default="mosaic_gpu")
    _add_common(op, "cuDNN's attention over keys and values that are no pages")
    op = ops.add_parser("cache", help=cache.__doc__)
    op.add_argument("--ops", default=",".join(CACHE_OPS), help="names (default: %(default)s)")
    op.add_argument("--implementation", choices=get_args(CacheImplementation), default="mosaic_gpu")
    op.add_argument("--xla", action="store_true", help="also time the same by XLA")
    _add_common(
        op,
        "the Triton kernels of SGLang that `SGLANG_TRITON` names, and elsewhere plain ones of one "
        "program per token; needs PyTorch and Triton",
    )
    op = ops.add_parser("hisparse", help=hisparse.__doc__)
    op.add_argument("--ops", default=",".join(HISPARSE_OPS), help="names (default: %(default)s)")
    op.add_argument(
        "--implementation", choices=get_args(HiSparseImplementation), default="mosaic_gpu"
    )
    _add_common(op, "nothing: there is no peer")
    op.set_defaults(peer=False)
    return parser.parse_args(arguments)


def _add_common(op: argparse.ArgumentParser, peer: str) -> None:
    op.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True, help=f"also time {peer}"
    )
    op.add_argument(
        "--timer",
        choices=TIMERS,
        default="cupti",
        help="cupti: sum of the kernels of a call; trace: from its first start to its last end; "
        "wall: the host's clock (default: %(default)s)",
    )
    op.add_argument(
        "--heat",
        type=float,
        default=0.0,
        help="seconds of the same calls right before those that are timed: the clock of a GPU "
        "under load (default: %(default)s)",
    )
    op.add_argument("--out", type=Path, help="JSON lines to append to (default: one file per GPU)")
    op.add_argument("--commit", help="of the code (default: what git says)")


def chosen[T](names: str, of: dict[str, T], option: str) -> list[T]:
    """The values of a comma-separated list of names.

    Raises:
        ValueError: a name is unknown, or none is given.
    """
    listed = [name for name in names.split(",") if name]
    unknown = [name for name in listed if name not in of]
    if unknown or not listed:
        raise ValueError(f"{option}: got {names!r}, expected names of {', '.join(of)}")
    return [of[name] for name in listed]


def _sparse_decode(options: argparse.Namespace) -> Start:
    cases = chosen(options.cases, CASES, "--cases")
    layouts = chosen(options.layouts, NAMES, "--layouts")
    scale_formats = chosen(options.scale_formats, SCALE_FORMATS, "--scale-formats")
    measured = sparse_decode.caches(layouts, scale_formats)
    if options.peer and any(cache.has_peer for cache in measured):
        peers.check()

    def start(timer, ceilings, environment, failed):
        bench = sparse_decode.Bench(
            timer,
            ceilings,
            environment,
            options.implementation,
            with_peer=options.peer,
            sizes=SIZES,
        )
        return bench.run(cases, measured, failed=failed)

    return start


def _dense_decode(options: argparse.Namespace) -> Start:
    cases = chosen(options.cases, DENSE_CASES, "--cases")
    layouts = chosen(options.layouts, {name: name for name in LAYOUTS}, "--layouts")
    if options.peer and "bf16" in layouts:
        peers.check()

    def start(timer, ceilings, environment, failed):
        bench = dense_decode.Bench(
            timer, ceilings, environment, options.implementation, with_peer=options.peer
        )
        return bench.run(cases, layouts, failed=failed)

    return start


def _dense_prefill(options: argparse.Namespace) -> Start:
    cases = chosen(options.cases, DENSE_PREFILL_CASES, "--cases")

    def start(timer, ceilings, environment, failed):
        bench = dense_prefill.Bench(timer, ceilings, environment, options.implementation)
        return bench.run(cases, failed=failed)

    return start


def _sparse_prefill(options: argparse.Namespace) -> Start:
    cases = chosen(options.cases, PREFILL_CASES, "--cases")
    layouts = chosen(options.layouts, {name: name for name in LAYOUTS}, "--layouts")
    ways = chosen(options.ways, {way: way for way in get_args(sparse_prefill.Way)}, "--ways")
    if options.peer and {"bf16", "656"} & set(layouts):
        peers.check()

    def start(timer, ceilings, environment, failed):
        bench = sparse_prefill.Bench(
            timer, ceilings, environment, options.implementation, with_peer=options.peer
        )
        return bench.run(cases, layouts, ways, failed=failed)

    return start


def _select_topk(options: argparse.Namespace) -> Start:
    cases = chosen(options.cases, TOPK_CASES, "--cases")
    if options.peer:
        select_topk.FastTopk.load()

    def start(timer, ceilings, environment, failed):
        bench = select_topk.Bench(
            timer, ceilings, environment, options.implementation, with_peer=options.peer
        )
        return bench.run(cases, failed=failed)

    return start


def _indexer_logits(options: argparse.Namespace) -> Start:
    cases = chosen(options.cases, LOGITS_CASES, "--cases")
    if options.peer and any(case.has_peer for case in cases):
        DeepGEMM.load()

    def start(timer, ceilings, environment, failed):
        bench = indexer_logits.Bench(
            timer, ceilings, environment, options.implementation, with_peer=options.peer
        )
        return bench.run(cases, failed=failed)

    return start


def _decode_step(options: argparse.Namespace) -> Start:
    cases = chosen(options.cases, STEP_CASES, "--cases")
    if options.peer:
        DeepGEMM.load()
        peers.check()

    def start(timer, ceilings, environment, failed):
        bench = decode_step.Bench(
            timer, ceilings, environment, options.implementation, with_peer=options.peer
        )
        return bench.run(cases, failed=failed)

    return start


def _attention_layer(options: argparse.Namespace) -> Start:
    cases = chosen(options.cases, LAYER_CASES, "--cases")
    known = {name: name for name in attention_layer.DTYPES}
    dtypes = chosen(options.dtypes, known, "--dtypes")

    def start(timer, ceilings, environment, failed):
        bench = attention_layer.Bench(
            timer, ceilings, environment, options.implementation, with_peer=options.peer
        )
        return bench.run(cases, dtypes, failed=failed)

    return start


def _cache(options: argparse.Namespace) -> Start:
    ops = chosen(options.ops, CACHE_OPS, "--ops")
    if options.peer:
        cache_peer.check()

    def start(timer, ceilings, environment, failed):
        bench = cache.Bench(
            timer,
            ceilings,
            environment,
            options.implementation,
            with_peer=options.peer,
            with_xla=options.xla,
        )
        return bench.run([case for case in cache.CASES if case.op in ops], failed=failed)

    return start


def _hisparse(options: argparse.Namespace) -> Start:
    ops = chosen(options.ops, HISPARSE_OPS, "--ops")

    def start(timer, ceilings, environment, failed):
        bench = hisparse.Bench(timer, ceilings, environment, options.implementation)
        return bench.run([case for case in hisparse.CASES if case.op in ops], failed=failed)

    return start


PREPARED: dict[str, Callable[[argparse.Namespace], Start]] = {
    "sparse_decode": _sparse_decode,
    "dense_decode": _dense_decode,
    "dense_prefill": _dense_prefill,
    "sparse_prefill": _sparse_prefill,
    "select_topk": _select_topk,
    "indexer_logits": _indexer_logits,
    "decode_step": _decode_step,
    "attention_layer": _attention_layer,
    "cache": _cache,
    "hisparse": _hisparse,
}
TABLES: dict[str, Callable[[Any], Table]] = {
    "sparse_decode": records.table,
    "dense_decode": records.table,
    "dense_prefill": dense_prefill.table,
    "sparse_prefill": records.table,
    "select_topk": select_topk.table,
    "indexer_logits": indexer_logits.table,
    "decode_step": decode_step.table,
    "attention_layer": attention_layer.table,
    "cache": cache.table,
    "hisparse": hisparse.table,
}
