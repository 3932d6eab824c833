"""Tensor-core products of Hopper with the left operand in registers or in shared memory.

D[64, n] += A[64, 16] B[16, n], by a warpgroup. Of D, and of A in registers, the thread of warp w,
quad q and column c holds rows 16w + q and 16w + q + 8; of A, columns 2c, 2c + 1, 2c + 8 and 2c + 9;
of D, columns 8v + 2c and 8v + 2c + 1 for each v below n / 8. A fragment of A is four words of two
16-bit floats: the first pair of the upper and of the lower row, then the second pair of both. D is
a list of n / 2 floats in the order (v, row, column).
"""

from collections.abc import Sequence

from jaxlib.mlir.dialects import llvm

from pallas_kernels.device.simt import (
    Value,
    f32_type,
    fence_registers,
    fmax,
    i64,
    i64_type,
    ptx,
)

ROW_BYTES = 128
ATOM_BYTES = 8 * ROW_BYTES
PLAIN_MATRIX_BYTES = 8 * 16
PLAIN_COLUMN_BYTES = 8 * PLAIN_MATRIX_BYTES


def row_of(i: int) -> int:
    """Which of its two rows of D a thread's element `i` belongs to."""
    return (i >> 1) & 1


def largest_of_row(d: Sequence[Value], row: int) -> Value:
    """The largest of a thread's elements of one of its two rows; a NaN loses."""
    mine = [x for i, x in enumerate(d) if row_of(i) == row]
    while len(mine) > 1:
        mine = [fmax(a, b) for a, b in zip(mine[::2], mine[1::2], strict=True)]
    return mine[0]


def descriptor(address: Value, columns_stride: int = 0) -> Value:
    """An operand in shared memory: rows of 128 bytes, swizzled by 128 bytes, eight rows an atom.

    For B the same in both orders: rows are columns of B with 64 k each (`k_major`), or rows are k
    with 64 columns each; the next 64 columns are `columns_stride` bytes on. For A rows are rows
    with 64 k each. `address` is a multiple of 1024.
    """
    start = ((address & 0x3FFFF) >> 4).wide()
    return start | i64((1 << 62) | (ATOM_BYTES >> 4) << 32 | (columns_stride >> 4) << 16)


def plain_descriptor(address: Value) -> Value:
    """A in shared memory without a swizzle: matrices of 8 rows of 16 bytes, or 8 k.

    Those of all 64 rows one after the other, then those of the next 8 k. `address` is a multiple
    of 16.
    """
    start = ((address & 0x3FFFF) >> 4).wide()
    return start | i64((PLAIN_MATRIX_BYTES >> 4) << 32 | (PLAIN_COLUMN_BYTES >> 4) << 16)


def step(
    acc: Sequence[Value], a: Sequence[Value], b: Value, *, dtype: str, b_is_k_major: bool
) -> list[Value]:
    """acc + a b, issued, not finished: 16 k of 64 rows and 2 len(acc) columns.

    Args:
        acc: D.
        a: a fragment of A.
        b: descriptor of B.
        dtype: "f16" or "bf16".
        b_is_k_major: which order B has in memory.
    """
    a_names = ",".join(f"${2 * len(acc) + i}" for i in range(4))
    return _issue(acc, a, b, f"{{{a_names}}}", f"1, 1, 1, {int(not b_is_k_major)}", dtype)


def step_from_shared(
    acc: Sequence[Value],
    a: Value,
    b: Value,
    *,
    dtype: str,
    b_is_k_major: bool,
    replace: bool = False,
) -> list[Value]:
    """`step` with a descriptor of A; `replace` starts at zero instead of `acc`."""
    flags = f"{int(not replace)}, 1, 1, 0, {int(not b_is_k_major)}"
    return _issue(acc, [a], b, f"${2 * len(acc)}", flags, dtype)


def _issue(
    acc: Sequence[Value], a: Sequence[Value], b: Value, a_names: str, flags: str, dtype: str
) -> list[Value]:
    size = len(acc)
    names = ",".join(f"${i}" for i in range(size))
    text = (
        f"wgmma.mma_async.sync.aligned.m64n{2 * size}k16.f32.{dtype}.{dtype} "
        f"{{{names}}}, {a_names}, ${2 * size + len(a)}, {flags};"
    )
    letters = ["l" if value.type == i64_type() else "r" for value in a]
    constraints = ",".join(["=f"] * size + [str(i) for i in range(size)] + letters + ["l"])
    packed = llvm.inline_asm(
        llvm.StructType.get_literal([f32_type()] * size),
        [value.ir for value in (*acc, *a, b)],
        text,
        constraints,
        asm_dialect=0,
        has_side_effects=True,
    )
    return [Value(llvm.extractvalue(f32_type(), packed, [i])) for i in range(size)]


def first_e4m3_step(columns: int, a: Value, b: Value) -> list[Value]:
    """a b^T, issued, not finished: 32 k of 64 rows and so many columns.

    Args:
        columns: of D, rows of B.
        a: descriptor of A, e4m3, rows of k.
        b: the same of B.
    """
    size = columns // 2
    return _e4m3(size, "0", ["l", "l"], [a, b])


def e4m3_step(acc: Sequence[Value], a: Value, b: Value) -> list[Value]:
    """acc + a b^T, as `first_e4m3_step`."""
    tied = [str(i) for i in range(len(acc))]
    return _e4m3(len(acc), "1", [*tied, "l", "l"], [*acc, a, b])


def _e4m3(
    size: int, adds: str, constraints: Sequence[str], operands: Sequence[Value]
) -> list[Value]:
    names = ",".join(f"${i}" for i in range(size))
    first = size + len(operands) - 2
    packed = llvm.inline_asm(
        llvm.StructType.get_literal([f32_type()] * size),
        [value.ir for value in operands],
        f"wgmma.mma_async.sync.aligned.m64n{2 * size}k32.f32.e4m3.e4m3 "
        f"{{{names}}}, ${first}, ${first + 1}, {adds}, 1, 1;",
        ",".join(["=f"] * size + list(constraints)),
        asm_dialect=0,
        has_side_effects=True,
    )
    return [Value(llvm.extractvalue(f32_type(), packed, [i])) for i in range(size)]


def begin(values: Sequence[Value]) -> list[Value]:
    """Before the first product that reads or adds to `values`."""
    return fence_registers(values, "wgmma.fence.sync.aligned;")


def commit() -> None:
    """Closes a group of products."""
    ptx("wgmma.commit_group.sync.aligned;", convergent=True)


def wait(pending: int, values: Sequence[Value]) -> list[Value]:
    """Waits until at most `pending` groups run; `values` may be read if they are finished."""
    if not values:
        ptx(f"wgmma.wait_group.sync.aligned {pending};", convergent=True)
        return []
    return fence_registers(values, f"wgmma.wait_group.sync.aligned {pending};")
