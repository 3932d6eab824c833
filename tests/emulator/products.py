"""Products of the tensor cores, whose sums may be read once they were waited for."""

import functools
import re
from typing import NamedTuple

import numpy as np

from tests.emulator.arithmetic import E4M3, FLOATS, pairs
from tests.emulator.faults import Fault
from tests.emulator.lanes import LANES, WARP, F32Type, Lanes, Type
from tests.emulator.ptx import instruction
from tests.emulator.shared_memory import REGION
from tests.emulator.warpgroup import WARPS, Warpgroup, current

K_BYTES = 32  # of a row of an operand in shared memory that one product takes
K = K_BYTES // 2  # of 16 bits each
ROWS = 64
_ROW_BYTES = 128
_PLAIN, _SWIZZLE_128 = 0, 1
_PLAIN_ROW_BYTES = 16

_PRODUCT = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(f16|bf16)\.\2 "
    r"\{[^}]*\}, (\{[^}]*\}|\$\d+), \$\d+, ([^;]*);"
)
_E4M3_PRODUCT = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k32\.f32\.e4m3\.e4m3 "
    r"\{[^}]*\}, \$\d+, \$\d+, ([01]), 1, 1;"
)


class Group:
    """Products that are waited for together.

    Attributes:
        words: of shared memory that they read.
        finished: whether they were waited for.
    """

    def __init__(self) -> None:
        self.words: list[np.ndarray] = []
        self.finished = False


class Sum(Lanes):
    """A sum that products add to; not to be read before their group has finished."""

    __slots__ = ("group", "held")

    def __init__(self, held: np.ndarray, group: Group) -> None:
        self.held, self.group = held, group

    @property
    def array(self) -> np.ndarray:  # type: ignore[override]
        if not self.group.finished:
            raise Fault("a sum is read before its products were waited for")
        return self.held

    @property
    def type(self) -> Type:
        return F32Type.get()


class Products:
    """Those that one warpgroup has under way, in groups."""

    def __init__(self) -> None:
        self._groups: list[Group] = []
        self._open = Group()

    def issue(self, text: str, size: int, operands: list[Lanes]) -> list[Lanes]:
        """D + A B: `operands` are D, A as four words or a descriptor, and a descriptor of B.

        D of `size` elements may be left out where it is not added to.
        """
        group = current()
        group.expect_all("wgmma")
        if match := _E4M3_PRODUCT.fullmatch(text):
            return self._issue_e4m3(group, match, size, operands)
        match = _PRODUCT.fullmatch(text)
        if match is None or int(match[1]) != 2 * size:
            raise NotImplementedError(f"{text=}: the emulator does not know this product")
        flags = [int(flag) for flag in match[4].split(",")]
        adds, transposed, kind = flags[0], flags[-1], FLOATS[match[2]]
        if flags[1:3] != [1, 1] or (match[3][0] == "$" and flags[3]):
            raise NotImplementedError(f"{flags=}: expected no other signs, and A as it is")
        b = self._shared(group, _address(operands[-1]), 2 * size, bool(transposed)).view(kind)
        if match[3].startswith("{"):
            a = _left_operand(operands[size:-1], kind)
        else:
            left = self._shared(group, _address(operands[size]), ROWS, False)
            a = left.view(kind).astype(np.float32)
        right = b.astype(np.float32)
        product = a @ (right if transposed else right.T)
        return self._sums(product, operands[:size] if adds else [], size)

    def _issue_e4m3(
        self, group: Warpgroup, match: re.Match, size: int, operands: list[Lanes]
    ) -> list[Lanes]:
        if int(match[1]) != 2 * size or len(operands) != 2 + size * int(match[2]):
            raise NotImplementedError(f"{match[0]=}, {len(operands)=}: expected D where it adds")
        a, b = (
            self._shared(group, _address(each), rows, False).view(E4M3).astype(np.float32)
            for each, rows in ((operands[-2], ROWS), (operands[-1], 2 * size))
        )
        return self._sums(a @ b.T, operands[:-2], size)

    def _sums(self, product: np.ndarray, before: list[Lanes], size: int) -> list[Lanes]:
        """What each thread has of a product, with what it had before if that is added."""
        own = product[_places(size)]
        if not before:
            return [Sum(x, self._open) for x in own]
        sums = [x.held if isinstance(x, Sum) else x.array for x in before]
        return [Sum(x + y, self._open) for x, y in zip(sums, own, strict=True)]

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = Group()

    def wait(self, pending: int) -> None:
        """All groups but the last `pending` finish."""
        group = current()
        count = max(0, len(self._groups) - pending)
        warps = _warps(group)
        races = group.block.shared.races
        for finished in self._groups[:count]:
            finished.finished = True
            for words in finished.words:
                races.finish_product(words, warps)
        self._groups = self._groups[count:]
        # Those that still run may read some of the same words.
        for running in (*self._groups, self._open):
            for words in running.words:
                races.begin_product(words, warps)

    def expect_none(self) -> None:
        """Raises `Fault` if a warpgroup that ends has not waited for its products."""
        if self._groups or self._open.words:
            raise Fault(f"{len(self._groups)=}: products without a wait")

    def _shared(self, group: Warpgroup, at: "_Address", rows: int, transposed: bool) -> np.ndarray:
        """An operand as words: [rows, 8], of two k each, or [16, rows // 2] if transposed."""
        offsets = _offsets if at.swizzled else _plain_offsets
        addresses = at.start + offsets(rows, transposed, at.atoms, at.columns)
        # The bits of the address choose, wherever the operand begins.
        if at.swizzled:
            addresses ^= ((addresses >> 7) & 7) << 4
        addresses += group.rank * REGION
        loaded = group.block.shared.multiplied(addresses)
        words = (addresses >> 2).ravel()
        group.block.shared.races.begin_product(words, _warps(group))
        self._open.words.append(words)
        return np.ascontiguousarray(loaded)


class _Address(NamedTuple):
    """A descriptor: where an operand begins, the strides of atoms and columns, and the swizzle.

    Columns are 64 if it is swizzled, else the 8 k of a matrix.
    """

    start: int
    atoms: int
    columns: int
    swizzled: bool


def _address(operand: Lanes) -> _Address:
    if (operand.array != operand.array[0]).any():
        raise Fault(f"{operand.array=}: expected one descriptor of all threads")
    bits = int(operand.array[0])
    swizzle = bits >> 62
    if swizzle not in (_PLAIN, _SWIZZLE_128) or bits >> 46 & 0xFFFF:
        raise NotImplementedError(f"{bits=:#x}: expected a swizzle of 128 bytes or none, no base")
    start, atoms, columns = ((bits >> shift & 0x3FFF) << 4 for shift in (0, 32, 16))
    return _Address(start, atoms, columns, swizzle == _SWIZZLE_128)


@functools.cache
def _offsets(rows: int, transposed: bool, atoms: int, columns: int) -> np.ndarray:
    """The offsets of the words of an operand; rows are columns of B if it is transposed."""
    if not transposed:
        row, word = np.meshgrid(np.arange(rows), np.arange(K // 2), indexing="ij")
        return (row >> 3) * atoms + (row & 7) * _ROW_BYTES + 4 * word
    k, word = np.meshgrid(np.arange(K), np.arange(rows // 2), indexing="ij")
    if rows > 64 and not columns:
        raise Fault(f"{rows=} {columns=}: expected a stride between tiles of 64 columns")
    return (k >> 3) * atoms + (k & 7) * _ROW_BYTES + 4 * (word & 31) + (word >> 5) * columns


@functools.cache
def _plain_offsets(rows: int, transposed: bool, atoms: int, columns: int) -> np.ndarray:
    """The same for matrices of 8 rows of 16 bytes, `atoms` apart, and `columns` along k."""
    if transposed:
        raise NotImplementedError("a plain operand whose rows are k")
    row, word = np.meshgrid(np.arange(rows), np.arange(K // 2), indexing="ij")
    place = (row >> 3) * atoms + (row & 7) * _PLAIN_ROW_BYTES
    return place + (word >> 2) * columns + 4 * (word & 3)


def _warps(group: Warpgroup) -> range:
    return range(group.index * WARPS, (group.index + 1) * WARPS)


def _thread() -> tuple[np.ndarray, np.ndarray]:
    """The upper row and the pair of columns of each thread in a fragment."""
    lane = np.arange(LANES)
    return 16 * (lane // WARP) + lane % WARP // 4, 2 * (lane % 4)


def _left_operand(words: list[Lanes], kind: np.dtype) -> np.ndarray:
    matrix = np.empty((ROWS, K), np.float32)
    row, column = _thread()
    for i, word in enumerate(words):
        two = pairs(word.bits, kind).astype(np.float32)
        for e in range(2):
            matrix[row + 8 * (i & 1), column + 8 * (i >> 1) + e] = two[:, e]
    return matrix


@functools.cache
def _places(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [size, 128] of what each thread has of a sum."""
    i, (row, column) = np.arange(size)[:, None], _thread()
    return row + 8 * (i >> 1 & 1), column + 8 * (i >> 2) + (i & 1)


@instruction(r"wgmma\.fence\.sync\.aligned", targets=0)
def _fence(match: re.Match) -> None:
    current().expect_all(match[0])


@instruction(r"wgmma\.commit_group\.sync\.aligned", targets=0)
def _commit(match: re.Match) -> None:
    current().expect_all(match[0])
    current().products.commit()


@instruction(r"wgmma\.wait_group\.sync\.aligned", targets=0)
def _wait(match: re.Match, pending: int) -> None:
    current().expect_all(match[0])
    current().products.wait(pending)


@instruction(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32")
def warp_product(
    match: re.Match, a: list[np.ndarray], b: list[np.ndarray], d: list[np.ndarray]
) -> list[np.ndarray]:
    """A product of each warp, whose sum may be read at once."""
    current().whole_warps(match[0])
    lane = np.arange(LANES)
    warp, quad, column = lane // WARP, lane % WARP // 4, lane % 4
    left, right = np.zeros((WARPS, 16, 16)), np.zeros((WARPS, 16, 8))
    for pair in range(2):
        for parity in range(2):
            k = 8 * pair + 2 * column + parity
            for below in range(2):
                words = pairs(a[2 * pair + below], FLOATS["bf16"])
                left[warp, quad + 8 * below, k] = words[:, parity]
            right[warp, k, quad] = pairs(b[pair], FLOATS["bf16"])[:, parity]
    product = (left @ right).astype(np.float32)
    return [
        (d[i].view(np.float32) + product[warp, quad + 8 * (i // 2), 2 * column + i % 2]).view(
            np.uint32
        )
        for i in range(4)
    ]
