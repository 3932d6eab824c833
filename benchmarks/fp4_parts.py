"""Where the error of an FP4 cache comes from: bits per byte with parts of the latents rounded.

python -m benchmarks.fp4_parts --windows 4
"""

import argparse
import math

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import track

from examples.byte_lm import ByteLMConfig, load_params
from examples.corpus import held_out_windows
from examples.decode_loop import WEIGHTS
from examples.training import losses

LENGTH = 4608


def main() -> None:
    """Print one line per part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=4)
    options = parser.parse_args()
    console = Console()
    config = ByteLMConfig()
    params, _ = load_params(WEIGHTS, config, dtype=jnp.bfloat16)
    windows = jnp.asarray(held_out_windows(LENGTH + 1, options.windows)).astype(jnp.int32)
    console.print(f"bits per byte of {options.windows} held-out windows of {LENGTH} bytes")
    exact = 0.0
    for name, sequences, part in (
        ("nothing rounded", 0, "row"),
        ("no-position part in FP4", 1, "nope"),
        ("rotary part in FP4", 1, "rope"),
        ("whole row in FP4", 1, "row"),
    ):
        measure = jax.jit(
            lambda tokens, sequences=sequences, part=part: losses(
                params,
                config,
                tokens,
                stage="sparse",
                attention="xla",
                fp4_sequences=sequences,
                fp4_part=part,
            )[0]
        )
        nats = [
            float(measure(window[None]))
            for window in track(windows, name, console=console, transient=True)
        ]
        bits = sum(nats) / len(nats) / math.log(2)
        exact = exact or bits
        console.print(f"{name:25} {bits:.4f}  {100 * (bits / exact - 1):+.2f} %")


if __name__ == "__main__":
    main()
