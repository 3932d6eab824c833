"""The emulator finds what it is there to find: small programs with a fault in each."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.emulator.faults import Fault
from tests.emulator.kernels import Kernels, kernels
from tests.emulator.lanes import LANES
from tests.emulator.shared_memory import REGION
from tests.emulator.warpgroup import current


class Device:
    """What a program uses: 64 KiB of shared memory, a barrier, 64 words of global memory."""

    def __init__(self, copied: Kernels, source: Any) -> None:
        names = ("simt", "memory", "sync", "wgmma")
        self.simt, self.memory, self.sync, self.wgmma = (
            copied.modules[f"device.{name}"] for name in names
        )
        group = current()
        self.group, self.rank, self.thread = group.number, group.rank, self.simt.Thread.current()
        self.place, barrier = (
            self.simt.i32(at + REGION * group.rank) for at in group.block.shared.addresses
        )
        self.barrier = self.sync.Barriers(barrier, 1)
        self.source = self.memory.global_address(source)

    def start(self, arrivals: int = 4, words: int = 1) -> None:
        """Zeros in the first words of each of 128 threads, and a barrier."""
        first = self.simt.block_thread().equals(0)
        self.simt.when(first, lambda: self.barrier.initialise(arrivals))
        if self.group == 0:
            for i in range(words):
                self.store(0, offset=4 * LANES * i)
        self.meet()

    def meet(self) -> None:
        self.simt.ptx("bar.sync 0;", convergent=True)

    def wait(self) -> None:
        self.barrier.wait(0, self.simt.i32(0))

    def store(self, value: int, offset: int = 0) -> None:
        place = self.place + self.thread.index * 4
        self.memory.store_shared(place, [self.simt.i32(value)], offset)

    def load(self, turned: int = 0) -> np.ndarray:
        """The word of another lane."""
        place = self.place + (self.thread.index ^ turned) * 4
        return self.memory.load_shared(place, "r")[0].ir.array

    def copy(self) -> None:
        place = self.place + self.thread.index * 16
        self.memory.copy(place, self.source, self.simt.i32(16))

    def multiply(self) -> list[Any]:
        acc = self.wgmma.begin([self.simt.f32(0.0)] * 4)
        operand = self.wgmma.descriptor(self.place)
        left = [self.simt.i32(0)] * 4
        return self.wgmma.step(acc, left, operand, dtype="f16", b_is_k_major=True)


def run(program: Callable[[Device], None], warpgroups: int = 2, blocks: int = 1) -> None:
    copied = kernels()
    launch = copied.launcher.plgpu.kernel(
        lambda source, *_: program(Device(copied, source)),
        out_type=[jax.ShapeDtypeStruct((4,), jnp.float32)],
        grid=(1,),
        grid_names=("block",),
        num_threads=warpgroups,
        scratch_types=[1 << 16, 8],
        compiler_params=None,
        cluster=(blocks,),
        cluster_names=("part",),
    )
    launch(np.zeros(64, np.int32))


def test_what_was_written_before_a_barrier_may_be_read_behind_it():
    def program(device: Device) -> None:
        device.start()
        if device.group == 0:
            device.store(1)
            device.barrier.arrive_warp(0, device.thread)
        else:
            device.wait()
            assert (device.load(turned=77) == 1).all()

    run(program)


@pytest.mark.parametrize("forgotten", ["wait", "warp sync", "arrivals"])
def test_races_between_warpgroups(forgotten: str):
    def program(device: Device) -> None:
        device.start(arrivals=1 if forgotten == "arrivals" else 4)
        if device.group == 0:
            device.store(1)
            if forgotten == "warp sync":
                first = device.thread.lane.equals(0)
                device.simt.when(first, lambda: device.barrier.arrive(0))
            elif forgotten == "arrivals":
                last = device.thread.index.equals(LANES - 1)
                device.simt.when(last, lambda: device.barrier.arrive(0))
            else:
                device.barrier.arrive_warp(0, device.thread)
        else:
            if forgotten != "wait":
                device.wait()
            device.load()

    with pytest.raises(Fault, match=r"is not ordered before this|has been read"):
        run(program)


def test_a_race_between_lanes_of_a_warp():
    def program(device: Device) -> None:
        device.start()
        device.store(1)
        device.load(turned=1)

    with pytest.raises(Fault, match=r"lane 1 reads|lane 0 reads"):
        run(program, warpgroups=1)


def test_a_word_that_is_overwritten_before_all_have_read_it():
    def program(device: Device) -> None:
        device.start()
        device.load(turned=32)
        device.store(1)

    with pytest.raises(Fault, match="has been read by warp"):
        run(program, warpgroups=1)


def test_a_deadlock_says_who_waits_for_what():
    def program(device: Device) -> None:
        device.start(arrivals=5)
        device.barrier.arrive_warp(0, device.thread)
        device.wait()

    with pytest.raises(Fault, match=r"warpgroup 0 waits for the barrier .* 1 are missing"):
        run(program, warpgroups=1)


@pytest.mark.parametrize("waits", [False, True])
def test_copies_land_when_they_were_waited_for(waits: bool):
    def program(device: Device) -> None:
        device.copy()
        device.simt.ptx("cp.async.commit_group;")
        if waits:
            device.simt.ptx("cp.async.wait_group 0;")
        place = device.place + device.thread.index * 16
        assert not device.memory.load_shared(place, "r")[0].ir.array.any()

    if waits:
        run(program, warpgroups=1)
        return
    with pytest.raises(Fault, match="or has landed"):
        run(program, warpgroups=1)


@pytest.mark.parametrize("fault", [None, "no fence", "read early", "no commit", "overwritten"])
def test_products(fault: str | None):
    def program(device: Device) -> None:
        device.start(words=4)
        if fault != "no fence":
            device.sync.proxy_fence()
        device.meet()
        if device.group == 0:
            total = device.multiply()
            if fault != "no commit":
                device.wgmma.commit()
            if fault == "overwritten":
                device.meet()
            if fault != "read early":
                total = device.wgmma.wait(0, total)
            assert not total[0].ir.array.any()
        elif fault == "overwritten":
            device.meet()
            device.store(1)

    if fault is None:
        run(program)
        return
    message = {
        "no fence": "is not fenced",
        "read early": "before its products were waited for",
        "no commit": "before its products were waited for",
        "overwritten": "has been read by warp",
    }
    with pytest.raises(Fault, match=message[fault]):
        run(program)


@pytest.mark.parametrize(
    ("offset", "words", "message"),
    [
        (4, 2, "misaligned"),
        (1 << 16, 1, "in no array"),
        (1 << 20, 1, "outside"),
        (512, 1, "read before"),
    ],
)
def test_places(offset: int, words: int, message: str):
    def program(device: Device) -> None:
        device.start()
        device.memory.load_shared(device.place, "r" * words, offset)

    with pytest.raises(Fault, match=message):
        run(program, warpgroups=1)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, None),
        ("no wait", "not ordered"),
        ("no fence", "not ordered"),
        ("overwritten", "has been read"),
        ("too few bytes", "deadlock.*-256 bytes"),
        ("too many bytes", "deadlock.* 256 bytes"),
        ("no barrier yet", "no barrier was initialised"),
        ("no farewell", "has ended"),
        ("plain store", "accesses another block"),
    ],
)
def test_copies_to_the_other_block_of_a_cluster(
    fault: str | None, message: str | None, monkeypatch: pytest.MonkeyPatch
):
    """From the first block, whose warps send 128 bytes each, to the second."""

    def program(device: Device) -> None:
        sync, first = device.sync, device.rank == 0
        other = sync.in_block(device.place, device.simt.i32(1 - device.rank)) - device.place
        if fault != "no barrier yet":
            device.start()
        sync.arrive_cluster()
        sync.wait_cluster()
        if first:
            device.store(1)
            if fault != "no fence":
                sync.proxy_fence()
            device.simt.ptx("bar.warp.sync -1;", convergent=True)
            if fault == "plain store":
                device.store(1, offset=REGION)

            def send() -> None:
                source = device.place + device.thread.warp * 128
                barrier = device.barrier.at(0) + other
                sync.copy_to_block(source + other, source, 128, barrier)

            device.simt.when(device.thread.lane.equals(0), send)
            if fault == "overwritten":
                device.store(2)
        elif fault != "no farewell":
            expected = {"too few bytes": 64, "too many bytes": 192}.get(fault or "", 128)
            if fault != "no barrier yet":
                device.barrier.arrive_warp(0, device.thread, expected=expected)
            if fault != "no wait":
                device.wait()
            assert (device.load(turned=77) == 1).all()
        if fault != "no farewell":
            sync.arrive_cluster()
            sync.wait_cluster()

    if fault is None:
        run(program, warpgroups=1, blocks=2)
        return
    with pytest.raises(Fault, match=message):
        for seed in range(8):  # of which some find the second block at its end
            monkeypatch.setattr(kernels().launcher, "seed", seed)
            run(program, warpgroups=1, blocks=2)


def test_global_memory_ends_where_an_array_does():
    with pytest.raises(Fault, match="out of bounds"):
        run(lambda device: device.memory.load_global(device.source, "r", 256), warpgroups=1)
    with pytest.raises(Fault, match="to an operand"):
        run(lambda device: device.memory.store_global(device.source, [device.simt.i32(0)]), 1)


def test_an_instruction_that_it_does_not_know():
    with pytest.raises(NotImplementedError, match="bfind"):
        run(lambda device: device.simt.ptx("bfind.u32 $0, $1;", device.place, out="r"))


def test_other_tests_have_the_kernels_as_they_are():
    copied = kernels().modules
    for name, module in copied.items():
        if name != "pallas_kernels":
            assert importlib.import_module(f"pallas_kernels.{name}") is not module
    simt = importlib.import_module("pallas_kernels.device.simt")
    assert simt.Value is not copied["device.simt"].Value
    assert simt.loop.__module__ == "pallas_kernels.device.simt"
