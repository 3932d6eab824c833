"""One measured case: a line of JSON, a row of a table."""

import dataclasses
import datetime
import json
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import jax
from rich.table import Table

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PACKAGES = ("jax", "jaxlib", "torch", "sgl-flash-mla", "sglang-kernel", "sgl-deep-gemm")


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where and when a run happened."""

    date: str
    gpu: str
    versions: str
    commit: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One line of the results; None stands for what was not measured.

    Attributes:
        op: the op's name.
        case: `key=value` pairs: layout b h s_q topk s_kv n.
        indices: how the slots were drawn.
        scale_format: of a block-scale cache.
        implementation: of our op.
        ours_us: our time.
        peer: the other library.
        peer_us: its time.
        floor_us: the least time that this GPU's measured rates allow.
        bytes: of all rows that are read, as often as they are read.
        unique_bytes: of the different rows among them.
        flops: of both matrix products.
        tflops: our rate.
        gbps: our rate, of `bytes`.
        first_call_s: compilation and the first run.
        error: relative L2 error of our outputs against f64.
        peer_error: the peer's.
        lse_error: largest absolute error of our log-sum-exp.
        peer_lse_error: the peer's.
        gather_us: time to read the same rows and do nothing else.
        gather_by: what read them.
        matmul_tflops: rate of a large bf16 matrix product.
        copy_gbps: rate of a large copy, bytes read and written.
        method: how times were taken.
        environment: where and when; its fields are keys of the line.
    """

    op: str
    case: str
    indices: str
    scale_format: str | None
    implementation: str
    ours_us: float
    peer: str | None
    peer_us: float | None
    floor_us: float
    bytes: int
    unique_bytes: int
    flops: int
    tflops: float
    gbps: float
    first_call_s: float
    error: float
    peer_error: float | None
    lse_error: float
    peer_lse_error: float | None
    gather_us: float
    gather_by: str
    matmul_tflops: float
    copy_gbps: float
    method: str
    environment: Environment

    def to_json(self) -> str:
        """One line, floats to five digits."""
        return to_json_line(self)


class Line(Protocol):
    """A measured case of any op."""

    def to_json(self) -> str:
        """One line."""


def to_json_line(record: Any) -> str:
    """A record with an `environment` as one line: floats to five digits, all keys on one level."""
    fields = dataclasses.asdict(record)
    fields |= fields.pop("environment")
    rounded = {
        key: float(f"{value:.5g}") if isinstance(value, float) else value
        for key, value in fields.items()
    }
    return json.dumps(rounded)


def append(record: Line, path: Path) -> None:
    """Add a line to the file, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(record.to_json() + "\n")


def results_path(gpu: str) -> Path:
    """The file of a kind of GPU."""
    return RESULTS / f"{gpu.removeprefix('NVIDIA ').replace(' ', '-')}.jsonl"


def environment(commit: str | None = None) -> Environment:
    """This machine, now.

    Args:
        commit: of the code; None asks git, and "" stands where git does not know.
    """
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    device = jax.devices()[0]
    # Of several lines, the last is the driver's API.
    found.append(device.client.platform_version.strip().splitlines()[-1])
    return Environment(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        gpu=device.device_kind,
        versions=", ".join(found),
        commit=_git_commit() if commit is None else commit,
    )


def _git_commit() -> str:
    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    try:
        # New files are code too, except for what benchmarks write.
        paths = (":(top)", ":(top,exclude)benchmarks/results")
        dirty = "-dirty" if git("status", "--porcelain", "--", *paths) else ""
        return git("rev-parse", "--short", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return ""


def table(records: Sequence[Record]) -> Table:
    """The records as a table for a terminal."""
    first = records[0]
    made = Table(
        title=f"{first.op}, {first.environment.gpu}, µs ({first.method})",
        caption=f"copy {first.copy_gbps:.0f} GB/s, matmul {first.matmul_tflops:.0f} TFLOPS, "
        f"floor: the slower of the same rows read by {first.gather_by} and the flops at that rate",
    )
    made.add_column("case", overflow="fold")
    for name in (
        "ours",
        first.peer or "peer",
        "speedup",
        "floor",
        "TFLOPS",
        "GB/s",
        "error",
        "peer's",
        "lse error",
        "peer's",
        "first call s",
    ):
        made.add_column(name, justify="right")
    for record in records:
        words = (record.case, record.scale_format, record.indices)
        made.add_row(
            " ".join(word for word in words if word not in (None, "uniform")),
            f"{record.ours_us:.1f}",
            cell(record.peer_us, ".1f"),
            cell(record.peer_us and record.peer_us / record.ours_us, ".2f"),
            f"{record.floor_us:.1f}",
            f"{record.tflops:.0f}",
            f"{record.gbps:.0f}",
            f"{record.error:.2e}",
            cell(record.peer_error, ".2e"),
            f"{record.lse_error:.1e}",
            cell(record.peer_lse_error, ".1e"),
            f"{record.first_call_s:.1f}",
        )
    return made


def cell(value: float | None, form: str) -> str:
    """A number in a table, or what stands for none."""
    return "-" if value is None else format(value, form)
