"""Kernels that are compiled for an H200 in a process of their own, and what ptxas says of each."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.aot.h200 import sharding


def compiled(program: str, argument: Any, folder: Path) -> tuple[Any, list[str]]:
    """Runs a program; skips where there is nothing to compile with.

    The dumps are switched on before JAX is imported, hence the process.

    Args:
        program: Python, whose argument is JSON and whose last line of output is JSON.
        argument: its argument.
        folder: an empty one, for the dumps.

    Returns:
        What it printed last, and what ptxas said of each kernel.
    """
    sharding()  # skips
    dumps = {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, json.dumps(argument)],
        env=os.environ | dumps,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    said = [path.read_text() for path in folder.glob("*.ptxas")]
    return json.loads(run.stdout.splitlines()[-1]), said


def assert_good(said: list[str]) -> None:
    """No kernel spills a register, and none has products one at a time."""
    for text in said:
        spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
        assert set(spilled) == {("0", "0")}, text
        assert "serialized" not in text, text
