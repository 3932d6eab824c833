"""Per-thread code inside `plgpu.inline_mgpu`: values with operators, loops, branches, arithmetic.

Mosaic's arrays are spread over a warpgroup in layouts of its own. Code that decides itself which
thread loads which bytes is written with these scalars instead: every operation is one operation of
every thread. Functions here must be called while Mosaic is emitting a kernel.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

WARP = 32
WARPGROUP = 128


def i32_type() -> ir.Type:
    """A 32-bit word."""
    return ir.IntegerType.get_signless(32)


def i64_type() -> ir.Type:
    """A 64-bit word, which global addresses and descriptors take."""
    return ir.IntegerType.get_signless(64)


def f32_type() -> ir.Type:
    """A 32-bit float."""
    return ir.F32Type.get()


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """A scalar of one thread: i1, i32, i64 or f32. Integers are signed where it matters."""

    ir: ir.Value

    @property
    def type(self) -> ir.Type:
        """The MLIR type."""
        return self.ir.type

    @property
    def is_float(self) -> bool:
        """Whether this is an f32."""
        return isinstance(self.ir.type, ir.F32Type)

    def _lift(self, other: "Value | int | float") -> ir.Value:
        if isinstance(other, Value):
            return other.ir
        return arith.constant(self.ir.type, float(other) if self.is_float else int(other))

    def _binary(self, other: "Value | int | float", integer: Any, floating: Any = None) -> "Value":
        op = floating if self.is_float else integer
        return Value(op(self.ir, self._lift(other)))

    def __add__(self, other: "Value | int | float") -> "Value":
        return self._binary(other, arith.addi, arith.addf)

    def __sub__(self, other: "Value | int | float") -> "Value":
        return self._binary(other, arith.subi, arith.subf)

    def __mul__(self, other: "Value | int | float") -> "Value":
        return self._binary(other, arith.muli, arith.mulf)

    def __and__(self, other: "Value | int") -> "Value":
        return self._binary(other, arith.andi)

    def __or__(self, other: "Value | int") -> "Value":
        return self._binary(other, arith.ori)

    def __xor__(self, other: "Value | int") -> "Value":
        return self._binary(other, arith.xori)

    def __lshift__(self, other: "Value | int") -> "Value":
        return self._binary(other, arith.shli)

    def __rshift__(self, other: "Value | int") -> "Value":
        return self._binary(other, arith.shrui)

    def __floordiv__(self, other: "Value | int") -> "Value":
        return self._binary(other, arith.divui)

    def __mod__(self, other: "Value | int") -> "Value":
        return self._binary(other, arith.remui)

    def _compare(self, other: "Value | int | float", integer: Any, floating: Any) -> "Value":
        if self.is_float:
            return Value(arith.cmpf(floating, self.ir, self._lift(other)))
        return Value(arith.cmpi(integer, self.ir, self._lift(other)))

    def __lt__(self, other: "Value | int | float") -> "Value":
        return self._compare(other, arith.CmpIPredicate.slt, arith.CmpFPredicate.OLT)

    def __ge__(self, other: "Value | int | float") -> "Value":
        return self._compare(other, arith.CmpIPredicate.sge, arith.CmpFPredicate.OGE)

    def __gt__(self, other: "Value | int | float") -> "Value":
        return self._compare(other, arith.CmpIPredicate.sgt, arith.CmpFPredicate.OGT)

    def equals(self, other: "Value | int | float") -> "Value":
        """Whether the two are equal; `==` stays identity."""
        return self._compare(other, arith.CmpIPredicate.eq, arith.CmpFPredicate.OEQ)

    def below(self, other: "Value | int") -> "Value":
        """Unsigned comparison: also false for every negative number."""
        return Value(arith.cmpi(arith.CmpIPredicate.ult, self.ir, self._lift(other)))

    def at_least(self, other: "Value | int") -> "Value":
        """Unsigned comparison."""
        return Value(arith.cmpi(arith.CmpIPredicate.uge, self.ir, self._lift(other)))

    def wide(self) -> "Value":
        """This i32, not negative, as an i64."""
        return Value(arith.extui(i64_type(), self.ir))

    def as_f32(self) -> "Value":
        """The same 32 bits as a float."""
        return Value(arith.bitcast(f32_type(), self.ir))

    def as_i32(self) -> "Value":
        """The same 32 bits as an integer."""
        return Value(arith.bitcast(i32_type(), self.ir))


def i32(value: int) -> Value:
    """A constant."""
    return Value(arith.constant(i32_type(), value))


def i64(value: int) -> Value:
    """A constant."""
    return Value(arith.constant(i64_type(), value))


def f32(value: float) -> Value:
    """A constant."""
    return Value(arith.constant(f32_type(), value))


def select(condition: Value, a: Value, b: Value) -> Value:
    """`a` where the condition holds, else `b`."""
    return Value(arith.select(condition.ir, a.ir, b.ir))


def minimum(a: Value, b: Value | int) -> Value:
    """The smaller of two signed integers."""
    return Value(arith.minsi(a.ir, a._lift(b)))


def minimum_s16(a: Value, b: Value) -> Value:
    """The smaller of each of two pairs of signed 16-bit integers."""
    return ptx("min.s16x2 $0, $1, $2;", a, b, out="r", pure=True)[0]


def maximum_s16(a: Value, b: Value) -> Value:
    """The larger of each of two pairs of signed 16-bit integers."""
    return ptx("max.s16x2 $0, $1, $2;", a, b, out="r", pure=True)[0]


def choose_bits(a: Value, b: Value, mask: int) -> Value:
    """Bits of `a` where the mask is 1, else of `b`."""
    return ptx("lop3.b32 $0, $1, $2, $3, 0xE4;", a, b, i32(mask), out="r", pure=True)[0]


def maximum(a: Value, b: Value | int) -> Value:
    """The larger of two signed integers."""
    return Value(arith.maxsi(a.ir, a._lift(b)))


def floor_divide(a: Value, b: int) -> Value:
    """a / b of a signed integer, rounded down; `b` is a power of two."""
    return Value(arith.shrsi(a.ir, a._lift(b.bit_length() - 1)))


def int_to_float(a: Value) -> Value:
    """The nearest float."""
    return Value(arith.sitofp(f32_type(), a.ir))


def float_to_int(a: Value) -> Value:
    """The integer part of a float."""
    return ptx("cvt.rzi.s32.f32 $0, $1;", a, out="r", pure=True)[0]


def bool_to_int(a: Value) -> Value:
    """1 where the condition holds, else 0."""
    return Value(arith.extui(i32_type(), a.ir))


def count_bits(a: Value) -> Value:
    """How many bits of a word are set."""
    return ptx("popc.b32 $0, $1;", a, out="r", pure=True)[0]


def bit_length(a: Value) -> Value:
    """How many bits an unsigned word needs; 0 for 0."""
    return i32(32) - ptx("clz.b32 $0, $1;", a, out="r", pure=True)[0]


def lowest_bit(a: Value) -> Value:
    """The number of the lowest bit that is set in a word, which is not 0."""
    (reversed_,) = ptx("brev.b32 $0, $1;", a, out="r", pure=True)
    return ptx("clz.b32 $0, $1;", reversed_, out="r", pure=True)[0]


def maximum_unsigned(a: Value, b: Value) -> Value:
    """The larger of two unsigned integers."""
    return ptx("max.u32 $0, $1, $2;", a, b, out="r", pure=True)[0]


def ptx(
    text: str,
    *operands: Value,
    out: Sequence[str] | None = None,
    pure: bool = False,
    convergent: bool = False,
) -> list[Value]:
    """PTX with `$0`.. for the outputs, then the operands.

    Args:
        text: the instructions.
        operands: inputs.
        out: a type letter per output: "r" i32, "l" i64, "f" f32.
        pure: the compiler may move, merge or drop it.
        convergent: other threads take part, as in a shuffle or a barrier.
    """
    types = {"r": i32_type(), "l": i64_type(), "f": f32_type()}
    arguments = [operand.ir for operand in operands]
    if not out:
        mgpu_utils.inline_ptx(text, *arguments, has_side_effects=True, convergent=convergent)
        return []
    results = mgpu_utils.inline_ptx(
        text,
        *arguments,
        result_types=[types[letter] for letter in out],
        has_side_effects=not pure,
        convergent=convergent,
    )
    return [Value(result) for result in results]


def fence_registers(values: Sequence[Value], text: str = "") -> list[Value]:
    """Runs `text` at a point that no computation of `values`, or from them, may cross."""
    letters = ["f" if value.is_float else "r" for value in values]
    constraints = ",".join(
        [f"={letter}" for letter in letters] + [str(i) for i in range(len(values))]
    )
    types = [value.type for value in values]
    if not values:
        ptx(text)
        return []
    packed = llvm.inline_asm(
        types[0] if len(types) == 1 else llvm.StructType.get_literal(types),
        [value.ir for value in values],
        text,
        constraints,
        asm_dialect=0,
        has_side_effects=True,
    )
    if len(types) == 1:
        return [Value(packed)]
    return [Value(llvm.extractvalue(t, packed, [i])) for i, t in enumerate(types)]


def loop(
    lower: Value | int, upper: Value, carry: Sequence[Value], body: Callable[..., Sequence[Value]]
) -> list[Value]:
    """`for i in range(lower, upper): carry = body(i, *carry)`."""
    start = lower if isinstance(lower, Value) else i32(lower)
    op = scf.ForOp(start.ir, upper.ir, i32(1).ir, [value.ir for value in carry])
    with ir.InsertionPoint(op.body):
        results = body(Value(op.induction_variable), *(Value(arg) for arg in op.inner_iter_args))
        scf.yield_([value.ir for value in results or ()])
    return [Value(result) for result in op.results]


def when(condition: Value, body: Callable[[], None]) -> None:
    """Runs `body` in the threads in which the condition holds."""
    op = scf.IfOp(condition.ir)
    with ir.InsertionPoint(op.then_block):
        body()
        scf.yield_([])


def branch(
    condition: Value,
    otherwise: Sequence[Value],
    body: Callable[[], Sequence[Value]],
) -> list[Value]:
    """`body()` where the condition holds, else the values `otherwise`."""
    op = scf.IfOp(condition.ir, [value.type for value in otherwise], has_else=True)
    with ir.InsertionPoint(op.then_block):
        scf.yield_([value.ir for value in body()])
    with ir.InsertionPoint(op.else_block):
        scf.yield_([value.ir for value in otherwise])
    return [Value(result) for result in op.results]


def either(
    condition: Value,
    words: int,
    body: Callable[[], Sequence[Value] | None],
    other: Callable[[], Sequence[Value] | None],
) -> list[Value]:
    """The i32 words, if any, of `body()` where the condition holds, else those of `other()`."""
    op = scf.IfOp(condition.ir, [i32_type()] * words, has_else=True)
    for block, emit in ((op.then_block, body), (op.else_block, other)):
        with ir.InsertionPoint(block):
            scf.yield_([value.ir for value in emit() or ()])
    return [Value(result) for result in op.results]


@dataclasses.dataclass(frozen=True)
class Thread:
    """Where a thread is in its warpgroup of four warps.

    Attributes:
        index: 0 to 127.
        warp: 0 to 3.
        lane: 0 to 31.
        quad: lane // 4, the row of an 8 x 8 matrix in a tensor-core fragment.
        column: lane % 4, the pair of columns there.
    """

    index: Value
    warp: Value
    lane: Value
    quad: Value
    column: Value

    @classmethod
    def current(cls) -> Self:
        """The thread that runs this code."""
        index = block_thread() & (WARPGROUP - 1)
        # Broadcast from lane 0, so that the compiler knows it to be the same in the whole warp.
        (warp,) = ptx("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", index >> 5, out="r", convergent=True)
        lane = index & (WARP - 1)
        return cls(index, warp, lane, lane >> 2, lane & 3)


def block_thread() -> Value:
    """The number of this thread among all of its block."""
    return Value(mgpu_utils.thread_idx())


def scalar(argument: Any) -> Value:
    """A scalar argument of `inline_mgpu`, given with `Layout.WG_SPLAT`."""
    return Value(argument.registers.item())


def shuffle(value: Value, lane: Value | int) -> Value:
    """The value of another lane of the warp."""
    source = lane if isinstance(lane, Value) else i32(lane)
    kind = "f" if value.is_float else "r"
    return ptx("shfl.sync.idx.b32 $0, $1, $2, 31, -1;", value, source, out=kind, convergent=True)[0]


def shuffle_xor(value: Value, mask: int) -> Value:
    """The value of the lane whose number differs in the bits of `mask`."""
    kind = "f" if value.is_float else "r"
    return ptx(f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, -1;", value, out=kind, convergent=True)[0]


def sum_below(value: Value, lane: Value) -> Value:
    """The sum of the values of a warp's lanes up to this one, `lane`."""
    for distance in (1, 2, 4, 8, 16):
        (other,) = ptx(
            f"shfl.sync.up.b32 $0, $1, {distance}, 0, -1;", value, out="r", convergent=True
        )
        value = value + select(lane < distance, i32(0), other)
    return value


def sum_of_warp(value: Value) -> Value:
    """The sum of an integer over the lanes of a warp."""
    return ptx("redux.sync.add.s32 $0, $1, -1;", value, out="r", convergent=True)[0]


def maximum_of_warp(value: Value) -> Value:
    """The largest unsigned integer of the lanes of a warp."""
    return ptx("redux.sync.max.u32 $0, $1, -1;", value, out="r", convergent=True)[0]


def square_root(a: Value) -> Value:
    """The square root to two units in the last place."""
    return ptx("sqrt.approx.f32 $0, $1;", a, out="f", pure=True)[0]


def square_root_rounded(a: Value) -> Value:
    """The square root, correctly rounded."""
    return ptx("sqrt.rn.f32 $0, $1;", a, out="f", pure=True)[0]


def over_quad(value: Value, join: Callable[[Value, Value], Value]) -> Value:
    """The values of four neighbouring lanes joined, for all four."""
    for mask in (1, 2):
        value = join(value, shuffle_xor(value, mask))
    return value


def any_lane(condition: Value) -> Value:
    """Whether the condition holds in any lane of the warp."""
    (result,) = ptx(
        "{ .reg .pred mine, any; setp.ne.u32 mine, $1, 0; "
        "vote.sync.any.pred any, mine, -1; selp.u32 $0, 1, 0, any; }",
        bool_to_int(condition),
        out="r",
        convergent=True,
    )
    return result.equals(1)


def ballot(condition: Value) -> Value:
    """A bit for each lane of the warp: whether the condition holds there."""
    (result,) = ptx(
        "{ .reg .pred mine; setp.ne.u32 mine, $1, 0; vote.sync.ballot.b32 $0, mine, -1; }",
        bool_to_int(condition),
        out="r",
        convergent=True,
    )
    return result


def opaque(value: Value) -> Value:
    """The same value, of which the compiler knows nothing: what depends on it stays in its loop."""
    kind = "l" if value.type == i64_type() else "r"
    width = 64 if kind == "l" else 32
    return ptx(f"mov.b{width} $0, $1;", value, out=kind)[0]


def fma(a: Value, b: Value, c: Value) -> Value:
    """a * b + c, rounded once."""
    return ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c, out="f", pure=True)[0]


def fmax(a: Value, b: Value) -> Value:
    """The larger float; a NaN loses."""
    return ptx("max.f32 $0, $1, $2;", a, b, out="f", pure=True)[0]


def twice_relu(a: Value) -> Value:
    """a + |a|: twice a float where it is positive, else 0; a NaN stays.

    Additions run at twice the rate of maxima.
    """
    return ptx(
        "{ .reg .f32 size; abs.f32 size, $1; add.rn.f32 $0, $1, size; }", a, out="f", pure=True
    )[0]


def exp2(a: Value) -> Value:
    """2^a to two units in the last place."""
    return ptx("ex2.approx.ftz.f32 $0, $1;", a, out="f", pure=True)[0]


def log2(a: Value) -> Value:
    """log2(a), absolute error 2^-22."""
    return ptx("lg2.approx.f32 $0, $1;", a, out="f", pure=True)[0]


def divide(a: Value, b: Value) -> Value:
    """a / b, correctly rounded."""
    return ptx("div.rn.f32 $0, $1, $2;", a, b, out="f", pure=True)[0]
