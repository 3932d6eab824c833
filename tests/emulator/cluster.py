"""Instructions that reach other blocks of a cluster."""

import re

import numpy as np

from tests.emulator.faults import Fault
from tests.emulator.lanes import WARP
from tests.emulator.ptx import instruction
from tests.emulator.shared_memory import REGION
from tests.emulator.warpgroup import current


@instruction(r"mapa\.shared::cluster\.u32")
def in_block(match: re.Match, address: np.ndarray, rank: np.ndarray) -> np.ndarray:
    return address % np.uint32(REGION) + rank * np.uint32(REGION)


@instruction(r"mbarrier\.arrive\.shared::cluster\.b64")
def arrive(match: re.Match, address: np.ndarray) -> None:
    group = current()
    for rank in np.unique(address[group.mask] // REGION).tolist():
        _expect_running(rank)
    group.block.barriers.arrive(address)


@instruction(r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64")
def arrive_expecting(match: re.Match, address: np.ndarray, size: int) -> None:
    barriers = current().block.barriers
    barriers.expect(address, size)
    barriers.arrive(address)


@instruction(r"st\.async\.weak\.shared::cluster\.mbarrier::complete_tx::bytes\.b32", targets=0)
def store(match: re.Match, place: np.ndarray, value: np.ndarray, barrier: np.ndarray) -> None:
    mask = current().mask
    for lane in np.flatnonzero(mask).tolist():
        _deliver(lane, int(place[lane]), value[lane : lane + 1], int(barrier[lane]))


@instruction(
    r"cp\.async\.bulk\.shared::cluster\.shared::cta\.mbarrier::complete_tx::bytes", targets=0
)
def copy(
    match: re.Match, place: np.ndarray, source: np.ndarray, size: int, barrier: np.ndarray
) -> None:
    group = current()
    shared = group.block.shared
    for lane in np.flatnonzero(group.mask).tolist():
        words = shared.moved(int(source[lane]), size)
        courier = group.block.clocks.courier(int(group.threads[lane]) // WARP, is_copy=True)
        shared.races.read(words[None], np.array([courier * WARP]))
        values = shared.multiplied(4 * words)
        _deliver(lane, int(place[lane]), values, int(barrier[lane]), is_copy=True)


@instruction(r"barrier\.cluster\.arrive\.release\.aligned", targets=0)
def arrive_cluster(match: re.Match) -> None:
    current().block.barriers.arrive_cluster()


@instruction(r"barrier\.cluster\.wait\.acquire\.aligned", targets=0)
def wait_cluster(match: re.Match) -> None:
    current().block.barriers.wait_cluster()


def _deliver(
    lane: int, place: int, values: np.ndarray, barrier: int, *, is_copy: bool = False
) -> None:
    """Words for a block, whose barrier is told of them: at once, which is one of many orders."""
    group = current()
    block = group.block
    if place // REGION != barrier // REGION:
        raise Fault(f"{place=:#x} {barrier=:#x}: expected both in one block")
    _expect_running(place // REGION)
    words = block.shared.moved(place, 4 * len(values))
    courier = block.clocks.courier(int(group.threads[lane]) // WARP, is_copy=is_copy)
    block.shared.races.write(words[None], np.array([courier * WARP]))
    block.shared.write(words, values)
    word = block.clocks.delivered(courier, is_copy=is_copy)
    block.barriers.receive(barrier, 4 * len(values), word)


def _expect_running(rank: int) -> None:
    if not current().block.running[rank]:
        raise Fault(f"{rank=}: the block has ended")
