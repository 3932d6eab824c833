"""Instructions that reach memory, barriers or other threads."""

import re
from typing import Any

import numpy as np

from tests.emulator import boxes
from tests.emulator.faults import Fault
from tests.emulator.lanes import LANES, WARP
from tests.emulator.ptx import instruction
from tests.emulator.warpgroup import WARPS, current


def _columns(loaded: np.ndarray) -> Any:
    return loaded[:, 0] if loaded.shape[1] == 1 else list(loaded.T)


def _count(match: re.Match) -> int:
    return int(match["count"] or 1)


@instruction(r"ld\.shared(\.v(?P<count>[24]))?\.[bf]32")
def load_shared(match: re.Match, address: np.ndarray) -> Any:
    return _columns(current().block.shared.load(address, _count(match)))


@instruction(r"ld\.shared\.b16")
def load_shared_half(match: re.Match, address: np.ndarray) -> np.ndarray:
    return current().block.shared.load_half(address)


@instruction(r"ld\.global(\.nc)?(\.L1::no_allocate)?(\.v(?P<count>[24]))?\.[bf]32")
def load_global(match: re.Match, address: np.ndarray) -> Any:
    return _columns(current().block.memory.load(address, _count(match)))


@instruction(r"ld\.global\.nc\.u8")
def load_global_byte(match: re.Match, address: np.ndarray) -> np.ndarray:
    return current().block.memory.load_byte(address)


@instruction(r"st\.shared(\.v[24])?\.[bf]32", targets=0)
def store_shared(match: re.Match, address: np.ndarray, value: Any) -> None:
    current().block.shared.store(address, _rows(value))


@instruction(r"red\.shared\.(add|or|max)\.[ub]32", targets=0)
def reduce_shared(match: re.Match, address: np.ndarray, value: Any) -> None:
    current().block.shared.combine(address, _word(value), match[1])


@instruction(r"atom\.shared\.(add)\.u32")
def fetch_shared(match: re.Match, address: np.ndarray, value: Any) -> np.ndarray:
    return current().block.shared.combine(address, _word(value), match[1])


@instruction(r"st\.shared\.b16", targets=0)
def store_shared_half(match: re.Match, address: np.ndarray, value: np.ndarray) -> None:
    current().block.shared.store_half(address, value)


@instruction(r"st\.global(\.cs)?(\.v[24])?\.[bf]32", targets=0)
def store_global(match: re.Match, address: np.ndarray, value: Any) -> None:
    current().block.memory.store(address, _rows(value))


@instruction(r"st\.global\.u8", targets=0)
def store_global_byte(match: re.Match, address: np.ndarray, value: np.ndarray) -> None:
    current().block.memory.store_byte(address, value)


def _rows(value: Any) -> np.ndarray:
    return np.stack(value if isinstance(value, list) else [value], axis=1)


def _word(value: Any) -> np.ndarray:
    return np.broadcast_to(value, LANES).astype(np.uint32)


@instruction(r"cp\.async\.(cg|ca)\.shared\.global(\.L2::cache_hint)?", targets=0)
def copy(
    match: re.Match, place: Any, source: Any, chunk: int, size: Any, policy: Any = None
) -> None:
    if (policy is not None) != bool(match[2]):
        raise Fault(f"{match[0]} {policy=}: expected a policy with a hint alone")
    current().copies.begin(place, source, chunk, size)


@instruction(r"cp\.async\.commit_group", targets=0)
def commit_copies(match: re.Match) -> None:
    current().copies.commit(current())


@instruction(r"cp\.async\.wait_group", targets=0)
def wait_for_copies(match: re.Match, pending: int) -> None:
    current().copies.wait(current(), pending)


@instruction(r"cp\.async\.wait_all", targets=0)
def wait_for_all_copies(match: re.Match) -> None:
    current().copies.wait_all(current())


@instruction(r"cp\.async\.mbarrier\.arrive\.noinc\.shared::cta\.b64", targets=0)
def arrive_on_copies(match: re.Match, address: np.ndarray) -> None:
    current().copies.wait_all(current())
    current().block.barriers.arrive(address)


@instruction(
    r"cp\.async\.bulk\.tensor\.2d\.shared::cluster\.global\.tile"
    r"\.mbarrier::complete_tx::bytes",
    targets=0,
)
def copy_boxes(match: re.Match, places: np.ndarray, at: Any, barriers: np.ndarray) -> None:
    group = current()
    for i in np.nonzero(group.mask)[0].tolist():
        number, column, row = (int(np.broadcast_to(x, LANES)[i]) for x in at)
        thread = int(group.threads[i])
        boxes.copy(number, column, row, int(places[i]), thread, int(barriers[i]))


@instruction(r"mbarrier\.expect_tx\.relaxed\.cta\.shared::cta\.b64", targets=0)
def expect(match: re.Match, addresses: np.ndarray, size: int) -> None:
    current().block.barriers.expect(addresses, size)


@instruction(r"mbarrier\.init\.shared::cta\.b64", targets=0)
def initialise(match: re.Match, address: np.ndarray, count: int) -> None:
    current().block.barriers.initialise(address, count)


@instruction(r"mbarrier\.arrive\.shared::cta\.b64")
def arrive(match: re.Match, address: np.ndarray) -> None:
    current().block.barriers.arrive(address)


@instruction(r"mbarrier\.try_wait\.parity\.shared::cta\.b64")
def wait(match: re.Match, address: np.ndarray, parity: np.ndarray, limit: int) -> np.ndarray:
    current().block.barriers.wait(address, parity)
    return np.ones(LANES, bool)


@instruction(r"bar\.sync", targets=0)
def meet(match: re.Match, number: int, threads: int | None = None) -> None:
    block = current().block
    block.barriers.meet(number, threads or LANES * block.warpgroups_of_one)


@instruction(r"bar\.red\.or\.pred")
def meet_and_ask(match: re.Match, number: int, threads: int, holds: np.ndarray) -> np.ndarray:
    return np.full(LANES, current().block.barriers.meet(number, threads, holds))


@instruction(r"bar\.warp\.sync", targets=0)
def sync_warp(match: re.Match, mask: int) -> None:
    for warp in current().whole_warps(match[0]):
        current().block.clocks.sync_warp(warp)


@instruction(r"fence\.proxy\.async\.shared::cta", targets=0)
def fence(match: re.Match) -> None:
    for warp in current().whole_warps(match[0]):
        current().block.clocks.fence(warp)


@instruction(r"fence\.mbarrier_init\.release\.cluster", targets=0)
def fence_barriers(match: re.Match) -> None:
    """The barrier of the block that follows is what orders the emulated ones."""


@instruction(r"shfl\.sync\.(idx|bfly)\.b32")
def shuffle(match: re.Match, value: np.ndarray, other: Any, clamp: int, mask: int) -> np.ndarray:
    current().whole_warps(match[0])
    lanes, numbers = np.arange(LANES), np.broadcast_to(other, LANES).astype(np.int64)
    source = lanes ^ numbers if match[1] == "bfly" else (lanes & -WARP) + (numbers & clamp)
    return value[source]


@instruction(r"shfl\.sync\.up\.b32")
def shuffle_up(
    match: re.Match, value: np.ndarray, distance: int, first: int, mask: int
) -> np.ndarray:
    current().whole_warps(match[0])
    lanes = np.arange(LANES)
    return value[np.where(lanes % WARP < distance, lanes, lanes - distance)]


@instruction(r"vote\.sync\.any\.pred")
def vote(match: re.Match, holds: np.ndarray, mask: int) -> np.ndarray:
    current().whole_warps(match[0])
    return np.repeat(holds.reshape(WARPS, WARP).any(1), WARP)


@instruction(r"vote\.sync\.ballot\.b32")
def ballot(match: re.Match, holds: np.ndarray, mask: int) -> np.ndarray:
    current().whole_warps(match[0])
    bits = (holds.reshape(WARPS, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
    return np.repeat(bits.astype(np.uint32), WARP)


@instruction(r"cp\.async\.bulk\.prefetch\.L2\.global", targets=0)
def prefetch(match: re.Match, source: np.ndarray, size: np.ndarray) -> None:
    mask = current().mask
    current().block.memory.expect(source[mask], size[mask])


@instruction(r"redux\.sync\.(max|add)\.([su])32")
def reduce_warp(match: re.Match, value: np.ndarray, mask: int) -> np.ndarray:
    current().whole_warps(match[0])
    kind = np.int32 if match[2] == "s" else np.uint32
    rows = value.view(kind).reshape(WARPS, WARP)
    results = rows.max(1) if match[1] == "max" else rows.sum(1, dtype=kind)
    return np.repeat(results, WARP).view(np.uint32)
