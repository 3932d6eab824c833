"""Bank conflicts: how often the worst access of a function has to be repeated."""

import sys

import numpy as np

from tests.emulator.lanes import WARP

BANKS = 32
_KERNELS = "/pallas_kernels/"
_ACCESSORS = ("/device/memory.py", "/device/simt.py")


class BankConflicts:
    """A watcher of shared memory.

    Attributes:
        ways: for each function of the kernels, the most words of one bank that threads served
            together want; 1 is none.
    """

    def __init__(self) -> None:
        self.ways: dict[str, int] = {}

    def __call__(self, size: int, addresses: np.ndarray, threads: np.ndarray) -> None:
        """32 lanes are served together, 16 of 8 bytes each, 8 of 16 bytes."""
        together = WARP * 4 // max(size, 4)
        words = (addresses >> 2)[:, None] + np.arange(max(size // 4, 1))
        served = np.repeat((threads // together)[:, None], words.shape[1], axis=1)
        wanted = np.unique(np.stack([served.ravel(), words.ravel() % BANKS, words.ravel()]), axis=1)
        _, counts = np.unique(wanted[:2], axis=1, return_counts=True)
        name = _caller()
        self.ways[name] = max(self.ways.get(name, 1), int(counts.max()))


def _caller() -> str:
    """The function of the kernels that accesses memory."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if _KERNELS in path and not path.endswith(_ACCESSORS) and not name.startswith("<"):
            return name
        frame = frame.f_back
    raise AssertionError("expected an access by a function of the kernels")
