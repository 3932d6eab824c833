"""Barriers between the warps of a block, as words in shared memory and as named barriers.

Mosaic's own barriers count whole warpgroups and cannot be given to `inline_mgpu`; asynchronous
copies need the raw form.
"""

import dataclasses

from pallas_kernels.device.simt import Thread, Value, bool_to_int, i32, ptx, select, when

BYTES = 8


@dataclasses.dataclass(frozen=True)
class Barriers:
    """`count` mbarriers at consecutive 8-byte words of shared memory.

    Attributes:
        address: of the first.
        count: how many.
    """

    address: Value
    count: int

    def at(self, index: Value | int) -> Value:
        """The address of one."""
        return self.address + index * BYTES

    def initialise(self, arrivals: int) -> None:
        """By one thread, before a barrier of the whole block: each completes after `arrivals`."""
        for index in range(self.count):
            ptx(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", self.at(index))

    def wait(self, index: Value | int, parity: Value) -> None:
        """Waits until the phase of that parity has completed."""
        ptx(
            "{ .reg .pred done; again: "
            "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1, 0x989680; "
            "@done bra over; bra again; over: }",
            self.at(index),
            parity,
            convergent=True,
        )

    def arrive(self, index: Value | int) -> None:
        """One arrival by this thread."""
        ptx("mbarrier.arrive.shared::cta.b64 _, [$0];", self.at(index))

    def arrive_warp(self, index: Value | int, thread: Thread, *, expected: int = 0) -> None:
        """One arrival by this warp, after all its lanes have come here.

        Args:
            index: of the barrier.
            thread: this one.
            expected: bytes from other blocks that the phase waits for, too.
        """
        ptx("bar.warp.sync -1;", convergent=True)

        def arrive() -> None:
            if expected:
                text = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {expected};"
                ptx(text, self.at(index))
            else:
                self.arrive(index)

        when(thread.lane.equals(0), arrive)

    def arrive_warp_in_pair(self, index: Value | int, thread: Thread) -> None:
        """One arrival by this warp at this barrier of both blocks of a cluster of two."""
        ptx("bar.warp.sync -1;", convergent=True)

        def arrive() -> None:
            place = in_block(self.at(index), thread.lane)
            # A release for the cluster would wait for memory: 1 µs.
            ptx("mbarrier.arrive.shared::cluster.b64 _, [$0];", place)

        when(thread.lane < 2, arrive)

    def expect(self, index: Value | int, count: int) -> None:
        """The phase completes after so many more bytes of copies, too."""
        ptx(f"mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [$0], {count};", self.at(index))

    def arrive_on_copies(self, index: Value | int) -> None:
        """One arrival for this thread once its `cp.async` copies so far have landed."""
        ptx("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [$0];", self.at(index))


@dataclasses.dataclass(frozen=True)
class Ring:
    """Which of `size` slots a step uses, and the parity of the slot's barriers then.

    Attributes:
        size: number of slots.
        slot: 0 to size - 1.
        phase: 0 or 1, flipped at each return to slot 0.
    """

    size: int
    slot: Value
    phase: Value

    @classmethod
    def start(cls, size: int) -> "Ring":
        """The first step."""
        return cls(size, i32(0), i32(0))

    def values(self) -> list[Value]:
        """What a loop carries."""
        return [self.slot, self.phase]

    def next(self) -> "Ring":
        """The step after."""
        following = self.slot + 1
        wrapped = following.equals(self.size)
        return Ring(
            self.size,
            select(wrapped, i32(0), following),
            select(wrapped, self.phase ^ 1, self.phase),
        )

    def previous(self) -> "Ring":
        """The step before; a barrier's wait for what is before the first step does not block."""
        wrapped = self.slot.equals(0)
        return Ring(
            self.size,
            select(wrapped, i32(self.size - 1), self.slot - 1),
            select(wrapped, self.phase ^ 1, self.phase),
        )


def named_barrier(number: int, threads: int) -> None:
    """Joins `threads` threads; numbers below 8 are Mosaic's."""
    ptx(f"bar.sync {number}, {threads};", convergent=True)


def arrive_cluster() -> None:
    """This warp's writes to the cluster's shared memory are done; `wait_cluster` must follow."""
    ptx("barrier.cluster.arrive.release.aligned;", convergent=True)


def wait_cluster() -> None:
    """Waits for all threads of the cluster to arrive, and sees what they wrote."""
    ptx("barrier.cluster.wait.acquire.aligned;", convergent=True)


def in_block(address: Value, rank: Value) -> Value:
    """Where a block of the cluster has what this one has at an address."""
    return ptx("mapa.shared::cluster.u32 $0, $1, $2;", address, rank, out="r", pure=True)[0]


def store_in_block(place: Value, word: Value, barrier: Value) -> None:
    """Begins to store a word in a block of the cluster.

    Args:
        place: from `in_block`.
        word: of 32 bits.
        barrier: of that block, from `in_block`; it is told of the bytes when they are there.
    """
    ptx(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [$0], $1, [$2];",
        place,
        word,
        barrier,
    )


def copy_to_block(place: Value, source: Value, size: int, barrier: Value) -> None:
    """Begins to copy shared memory to that of a block of the cluster.

    Ordinary writes to the source want a `proxy_fence` before.

    Args:
        place: from `in_block`, a multiple of 16 like the source.
        source: the address here.
        size: bytes, a multiple of 16.
        barrier: of that block, from `in_block`; it is told of the bytes when they are there.
    """
    ptx(
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
        f"[$0], [$1], {size}, [$2];",
        place,
        source,
        barrier,
    )


def any_of(number: int, threads: int, condition: Value) -> Value:
    """Whether the condition holds in any of the `threads` threads that come here."""
    (result,) = ptx(
        "{ .reg .pred mine, any; setp.ne.u32 mine, $1, 0; "
        f"bar.red.or.pred any, {number}, {threads}, mine; selp.u32 $0, 1, 0, any; }}",
        bool_to_int(condition),
        out="r",
        convergent=True,
    )
    return result.equals(1)


def proxy_fence() -> None:
    """Makes this thread's ordinary writes to shared memory visible to the tensor cores."""
    ptx("fence.proxy.async.shared::cta;")
