"""What importing jmla costs, and what it promises to export."""

import subprocess
import sys

import jmla

MEASURE = """
import time, jax, jax.numpy
start = time.perf_counter()
import jmla
print(time.perf_counter() - start)
print(sorted(set(sys.modules) & {"matplotlib", "rich", "safetensors", "optax", "scipy"}))
"""


def measure() -> tuple[float, str]:
    run = subprocess.run(
        [sys.executable, "-c", "import sys" + MEASURE], capture_output=True, text=True, check=True
    )
    seconds, heavy = run.stdout.splitlines()
    return float(seconds), heavy


def test_import_is_cheap():
    # The best of a few: other processes may hold the machine.
    results = [measure() for _ in range(5)]
    assert min(seconds for seconds, _ in results) <= 0.3
    assert all(heavy == "[]" for _, heavy in results)


def test_every_exported_name_exists_and_is_documented():
    assert len(set(jmla.__all__)) == len(jmla.__all__)
    for name in jmla.__all__:
        assert getattr(jmla, name).__doc__, name
    assert jmla.__version__
