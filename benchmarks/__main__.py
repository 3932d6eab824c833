"""Time an op of this library beside its peer and this GPU's limits, in one run.

python -m benchmarks sparse_decode
python -m benchmarks sparse_decode --cases b128-h128,b1-h128 --layouts 656,bf16 --no-peer
python -m benchmarks dense_decode --layouts bf16,576,fp4
python -m benchmarks sparse_prefill --cases n4096-h128,n4096-h64 --heat 1
python -m benchmarks sparse_prefill --layouts 656,576,fp4 --ways direct,gather
python -m benchmarks select_topk
python -m benchmarks indexer_logits
python -m benchmarks decode_step
python -m benchmarks attention_layer --cases qwen3-235b-b128-s_kv4096
python -m benchmarks cache --ops append,requantize
python -m benchmarks hisparse --ops swap_in
"""

import dataclasses
import gc
import os
import sys
import traceback
from typing import Any

import jax
from rich.console import Console

from benchmarks import ops, records
from benchmarks.floors import measure_ceilings
from benchmarks.timing import TIMERS, MeasurementError

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192
TABLE_WIDTH = 180


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, append; 1 if a case has no result because measuring it failed."""
    # PyTorch and CuPy need memory beside JAX, which takes 75 % of the GPU's when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    options = ops.parse_arguments(__doc__ or "", arguments)
    # In a file a table does not fold to a terminal's width.
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    log = Console(stderr=True, soft_wrap=True)
    broken: list[str] = []

    def failed(name: str, error: Exception) -> None:
        if isinstance(error, NotImplementedError):
            text = f"not supported: {error}"
        elif isinstance(error, MeasurementError):
            text = f"failed: {error}"
        else:
            text = "failed: " + "".join(traceback.format_exception(error))
        if not isinstance(error, NotImplementedError):
            broken.append(name)
        log.print(f"{name}: {text}", markup=False, highlight=False)

    try:
        start = ops.PREPARED[options.op](options)
        at_rest = TIMERS[options.timer]()
        timer = dataclasses.replace(at_rest, heat_s=options.heat)
        if options.timer != "wall" and jax.default_backend() != "gpu":
            raise ValueError(
                f"--timer: {options.timer} needs a GPU, {jax.default_backend()=}; elsewhere only "
                "wall works"
            )
        environment = records.environment(options.commit)
        log.print(f"{environment.gpu}, {environment.versions}, {timer.method}", markup=False)
        ceilings = measure_ceilings(at_rest, copy_bytes=COPY_BYTES, matmul_size=MATMUL_SIZE)
        log.print(f"copy {ceilings.copy_gbps:.0f} GB/s, matmul {ceilings.matmul_tflops:.0f} TFLOPS")
    except (ValueError, ModuleNotFoundError, MeasurementError) as error:
        log.print(f"error: {error}", markup=False, highlight=False)
        return 2

    # Each measurement collects garbage: not among all that has been imported.
    gc.freeze()
    path = options.out or records.results_path(environment.gpu)
    done: list[Any] = []
    for record in start(timer, ceilings, environment, failed):
        records.append(record, path)
        done.append(record)
        log.print(record.to_json(), markup=False, highlight=False)
    if done:
        console.print(ops.TABLES[options.op](done))
        log.print(f"appended {len(done)} lines to {path}", markup=False)
    if broken:
        log.print(f"not measured: {', '.join(broken)}", markup=False)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
