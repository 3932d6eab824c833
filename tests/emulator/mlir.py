"""What `pallas_kernels.device` calls of MLIR and of Mosaic, with lanes for values."""

import re
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.emulator import arith
from tests.emulator.lanes import LANES, F32Type, IntegerType, Lanes, Type
from tests.emulator.products import Sum
from tests.emulator.ptx import execute
from tests.emulator.shared_memory import REGION
from tests.emulator.warpgroup import Warpgroup, current


class Reference(NamedTuple):
    """An array in shared memory, of 32-bit addresses, or in global memory, of 64-bit ones."""

    address: int
    width: int


class Index(int):
    """The number of a block, as Mosaic gives it to code for single threads."""

    def __mul__(self, other: int) -> "Index":
        return Index(int(self) * other)

    def __add__(self, other: int) -> "Index":
        return Index(int(self) + other)

    @property
    def registers(self) -> "Index":
        return self

    def item(self) -> Lanes:
        return arith.constant(IntegerType.get_signless(32), self)


def _inline_ptx(
    text: str,
    *operands: Lanes,
    result_types: Sequence[Type] = (),
    has_side_effects: bool,
    convergent: bool,
) -> list[Lanes]:
    first = len(result_types)
    registers = {f"${first + i}": operand.bits for i, operand in enumerate(operands)}
    execute(text, registers)
    return [Lanes.of_bits(registers[f"${i}"], kind) for i, kind in enumerate(result_types)]


def _inline_asm(
    result: Any,
    operands: list[Lanes],
    text: str,
    constraints: str,
    *,
    asm_dialect: int,
    has_side_effects: bool,
) -> Any:
    """Code whose outputs are its first inputs, changed or not; a product's may be new."""
    size = constraints.count("=")
    if re.fullmatch(r"(=f,)+l,l", constraints) and text.startswith("wgmma.mma_async"):
        return current().products.issue(text, size, operands)
    if not re.fullmatch(r"(=[rfl],)+" + ",".join(map(str, range(size))) + "(,[rl])*", constraints):
        raise NotImplementedError(f"{constraints=}: expected outputs tied to the first inputs")
    if text.startswith("wgmma.mma_async"):
        return current().products.issue(text, size, operands)
    execute(text, {})
    results = [_settled(operand) for operand in operands]
    return results if isinstance(result, tuple) else results[0]


def _settled(operand: Lanes) -> Lanes:
    if isinstance(operand, Sum) and operand.group.finished:
        return Lanes(operand.held)
    return operand


def _ptrtoint(kind: IntegerType, pointer: Reference) -> Lanes:
    if kind.width != pointer.width:
        raise TypeError(f"{kind=}: expected the width of {pointer=}")
    in_its_block = REGION * current().rank if pointer.width == 32 else 0
    return arith.constant(kind, pointer.address + in_its_block)


def _thread_idx(group: Warpgroup) -> Lanes:
    return Lanes(group.threads - np.uint32(group.rank * group.block.warpgroups_of_one * LANES))


ir = types.SimpleNamespace(IntegerType=IntegerType, F32Type=F32Type)
llvm = types.SimpleNamespace(
    inline_asm=_inline_asm,
    extractvalue=lambda kind, packed, position: packed[position[0]],
    ptrtoint=_ptrtoint,
    StructType=types.SimpleNamespace(get_literal=tuple),
)
mgpu_utils = types.SimpleNamespace(
    inline_ptx=_inline_ptx,
    memref_ptr=lambda reference: reference,
    thread_idx=lambda: _thread_idx(current()),
)
