"""Addresses, loads and stores of one thread."""

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir.dialects import llvm

from pallas_kernels.device.simt import (
    Value,
    bool_to_int,
    i32,
    i32_type,
    i64,
    i64_type,
    ptx,
    select,
)

CHUNK = 16  # bytes of one copy
WORD = 4


# What L2 does with lines that an access names: policies as `createpolicy` makes them, for all of an
# access.
KEPT = 0x14F0000000000000  # evicted last
READ_ONCE = 0x12F0000000000000  # evicted first


def copy(destination: Value, source: Value, size: Value, policy: int | None = None) -> None:
    """Begins to copy a chunk to shared memory: `size` bytes of it, and zeros for the rest.

    `policy` is `KEPT` or `READ_ONCE`; None leaves it to L2.
    """
    operands = [destination, source, size]
    if policy is None:
        ptx(f"cp.async.cg.shared.global [$0], [$1], {CHUNK}, $2;", *operands)
    else:
        text = f"cp.async.cg.shared.global.L2::cache_hint [$0], [$1], {CHUNK}, $2, $3;"
        ptx(text, *operands, i64(policy))


def copy_word(destination: Value, source: Value, size: Value) -> None:
    """Begins to copy a word to shared memory: `size` bytes of it, and zeros for the rest."""
    ptx(f"cp.async.ca.shared.global [$0], [$1], {WORD}, $2;", destination, source, size)


def prefetch(source: Value, size: Value) -> None:
    """Begins to bring `size` bytes to L2; both are multiples of 16."""
    ptx("cp.async.bulk.prefetch.L2.global [$0], $1;", source, size)


def copied_bytes(slot: Value) -> Value:
    """All of a chunk of the row in a slot, nothing for a slot that is masked."""
    return select(slot < 0, i32(0), i32(CHUNK))


def shared_address(ref: Any) -> Value:
    """The 32-bit address of a reference to shared memory."""
    return Value(llvm.ptrtoint(i32_type(), mgpu_utils.memref_ptr(ref)))


def global_address(ref: Any) -> Value:
    """The 64-bit address of a reference to global memory."""
    return Value(llvm.ptrtoint(i64_type(), mgpu_utils.memref_ptr(ref)))


def load_shared(address: Value, out: str, offset: int = 0) -> list[Value]:
    """1, 2 or 4 words of shared memory; `out` is "r" or "f" for each."""
    return ptx(f"ld.shared{_vector(out)} {_words(out)}, [${len(out)}+{offset}];", address, out=out)


def store_shared(address: Value, values: Sequence[Value], offset: int = 0) -> None:
    """Stores 1, 2 or 4 words of 32 bits."""
    kind = "f" if values[0].is_float else "r"
    ptx(
        f"st.shared{_vector(kind * len(values))} [$0+{offset}], {_words(kind * len(values), 1)};",
        address,
        *values,
    )


def store_shared_where(
    condition: Value, address: Value, values: Sequence[Value], space: str = "shared"
) -> None:
    """Stores 1, 2 or 4 words of 32 bits where the condition holds, without a branch."""
    kinds = "r" * len(values)
    ptx(
        "{ .reg .pred holds; setp.ne.u32 holds, $0, 0; "
        f"@holds st.{space}{_vector(kinds)} [$1], {_words(kinds, 2)}; }}",
        bool_to_int(condition),
        address,
        *values,
    )


def count_shared_where(condition: Value, address: Value) -> None:
    """Adds 1 to a word, with all that others add, where the condition holds."""
    ptx(
        "{ .reg .pred holds; setp.ne.u32 holds, $0, 0; @holds red.shared.add.u32 [$1], 1; }",
        bool_to_int(condition),
        address,
    )


def or_shared(address: Value, value: Value) -> None:
    """Sets bits of a word, with all that others set; nothing is done for a value of 0."""
    ptx(
        "{ .reg .pred holds; setp.ne.u32 holds, $1, 0; @holds red.shared.or.b32 [$0], $1; }",
        address,
        value,
    )


def fetch_add_shared(address: Value, value: Value, space: str = "shared") -> Value:
    """Adds to a word, with all that others add; what it was before."""
    return ptx(f"atom.{space}.add.u32 $0, [$1], $2;", address, value, out="r")[0]


def maximum_shared(address: Value, value: Value, space: str = "shared") -> None:
    """Raises an unsigned word to at least the value, with all others that do."""
    ptx(f"red.{space}.max.u32 [$0], $1;", address, value)


def load_global(address: Value, out: str, offset: int = 0, cache: str = ".nc") -> list[Value]:
    """1, 2 or 4 words of global memory that no thread writes meanwhile."""
    return ptx(
        f"ld.global{cache}{_vector(out)} {_words(out)}, [${len(out)}+{offset}];", address, out=out
    )


def load_global_byte(address: Value, offset: int = 0) -> Value:
    """A byte of global memory that no thread writes meanwhile, as a word."""
    return ptx(f"ld.global.nc.u8 $0, [$1+{offset}];", address, out="r")[0]


def store_global(
    address: Value, values: Sequence[Value], offset: int = 0, *, streams: bool = False
) -> None:
    """Stores 1, 2 or 4 words of 32 bits, which soon leave L2 if they are one of a stream."""
    kind = "f" if values[0].is_float else "r"
    how = ".cs" if streams else ""
    kinds = kind * len(values)
    text = f"st.global{how}{_vector(kinds)} [$0+{offset}], {_words(kinds, 1)};"
    ptx(text, address, *values)


def store_global_byte(address: Value, value: Value, offset: int = 0) -> None:
    """Stores the lowest byte of a word."""
    ptx(f"st.global.u8 [$0+{offset}], $1;", address, value)


def load_f16_twice(address: Value, offset: int) -> Value:
    """An f16 in shared memory, in both halves of a word."""
    text = f"{{ .reg .b16 half; ld.shared.b16 half, [$1+{offset}]; mov.b32 $0, {{half, half}}; }}"
    return ptx(text, address, out="r")[0]


def store_f16(address: Value, value: Value, offset: int) -> Value:
    """Stores a float as f16 in shared memory; the float that it has become."""
    text = (
        f"{{ .reg .b16 half; cvt.rn.f16.f32 half, $2; st.shared.b16 [$1+{offset}], half; "
        "cvt.f32.f16 $0, half; }"
    )
    return ptx(text, address, value, out="f")[0]


def _vector(kinds: str) -> str:
    size = f".v{len(kinds)}" if len(kinds) > 1 else ""
    return f"{size}.{'f32' if kinds[0] == 'f' else 'b32'}"


def _words(kinds: str, first: int = 0) -> str:
    names = ",".join(f"${first + i}" for i in range(len(kinds)))
    return f"{{{names}}}" if len(kinds) > 1 else names
