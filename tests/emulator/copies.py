"""Asynchronous copies to shared memory, whose bytes are there once they were waited for."""

from typing import NamedTuple

import numpy as np

from tests.emulator.faults import Fault
from tests.emulator.warpgroup import Warpgroup, current


class _Copy(NamedTuple):
    words: np.ndarray
    values: np.ndarray
    threads: np.ndarray


class Copies:
    """Those that one warpgroup has under way, in groups."""

    def __init__(self) -> None:
        self._groups: list[list[_Copy]] = []
        self._open: list[_Copy] = []

    def begin(self, places: np.ndarray, sources: np.ndarray, chunk: int, sizes: np.ndarray) -> None:
        """The running threads copy a chunk of that size each, `sizes` bytes of it and zeros."""
        group = current()
        shared = group.block.shared
        words = shared.words(places, chunk)
        # Even a copy of nothing names a chunk that exists.
        values = group.block.memory.read(sources[group.mask], chunk // 4)
        sizes = sizes[group.mask]
        if (sizes > chunk).any():
            raise Fault(f"{sizes.max()=}: {chunk=}")
        as_bytes = values.view(np.uint8)
        as_bytes[np.arange(chunk) >= sizes[:, None]] = 0
        threads = group.threads[group.mask]
        shared.races.write(words, threads, unfinished=True)
        shared.forget(words)
        self._open.append(_Copy(words, values, threads))

    def commit(self, group: Warpgroup) -> None:
        """Closes a group."""
        group.expect_all("cp.async.commit_group")
        self._groups.append(self._open)
        self._open = []

    def wait(self, group: Warpgroup, pending: int) -> None:
        """All groups but the last `pending` land."""
        group.expect_all("cp.async.wait_group")
        count = max(0, len(self._groups) - pending)
        for copies in self._groups[:count]:
            self._land(group, copies)
        self._groups = self._groups[count:]

    def wait_all(self, group: Warpgroup) -> None:
        """All that were begun land."""
        self.wait(group, 0)
        self._land(group, self._open)
        self._open = []

    def expect_none(self) -> None:
        """Raises `Fault` if a warpgroup that ends has begun what it has not waited for."""
        if self._open or any(self._groups):
            raise Fault(f"{len(self._groups)=} {len(self._open)=}: copies without a wait")

    def _land(self, group: Warpgroup, copies: list[_Copy]) -> None:
        for copy in copies:
            group.block.shared.races.finish_write(copy.words, copy.threads)
            group.block.shared.write(copy.words, copy.values)
