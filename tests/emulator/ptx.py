"""Reads PTX of the kernels and runs it: instructions, registers of a block of braces, jumps."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.emulator.faults import Fault
from tests.emulator.warpgroup import current

Registers = dict[str, Any]
# From the registers to bits: an array of 128, a list of them, or a number.
Operand = Callable[[Registers], Any]
# From the match of its pattern and its sources to what goes into its destinations.
Instruction = Callable[..., Any]

_INSTRUCTIONS: list[tuple[re.Pattern, int, Instruction]] = []


class _Statement(NamedTuple):
    """An instruction, or a jump.

    Attributes:
        guard: the register that says whether it runs, or None.
        jump: the label that it jumps to, or None.
        run: with the sources.
        targets: registers.
        sources: operands.
    """

    guard: str | None
    jump: str | None
    run: Instruction
    targets: tuple[str, ...]
    sources: tuple[Operand, ...]


def instruction(pattern: str, *, targets: int = 1) -> Callable[[Instruction], Instruction]:
    """Declares how to run what the pattern matches; so many operands are destinations."""

    def declare(function: Instruction) -> Instruction:
        _INSTRUCTIONS.append((re.compile(pattern), targets, function))
        return function

    return declare


def execute(text: str, registers: Registers) -> None:
    """Runs the text with its registers, which it changes."""
    statements, labels = _parse(text)
    at = 0
    while at < len(statements):
        statement = statements[at]
        at += 1
        if statement.guard is None:
            if statement.jump is None:
                _run(statement, registers)
            else:
                at = labels[statement.jump]
            continue
        holds = np.broadcast_to(registers[statement.guard], current().mask.shape)
        with current().only(holds) as any_holds:
            if not any_holds:
                continue
            if statement.jump is None:
                _run(statement, registers, only=holds)
                continue
        if not holds[current().mask].all():
            raise Fault(f"{text=}: threads part at a jump")
        at = labels[statement.jump]


def _run(statement: _Statement, registers: Registers, only: np.ndarray | None = None) -> None:
    results = statement.run(*(source(registers) for source in statement.sources))
    if len(statement.targets) == 1:
        results = [results]
    for name, result in zip(statement.targets, results or (), strict=True):
        registers[name] = result if only is None else np.where(only, result, registers[name])


@functools.cache
def _parse(text: str) -> tuple[list[_Statement], dict[str, int]]:
    body = text.strip()
    if body.startswith("{") and body.endswith("}"):
        body = body[1:-1]
    statements: list[_Statement] = []
    labels: dict[str, int] = {}
    for line in body.split(";"):
        line = line.strip()
        while label := re.match(r"(\w+):(?!:)\s*", line):
            labels[label[1]] = len(statements)
            line = line[label.end() :]
        if line and not line.startswith(".reg"):
            statements.append(_statement(line))
    return statements, labels


def _statement(line: str) -> _Statement:
    guard = re.match(r"@(\w+)\s+", line)
    if guard:
        line = line[guard.end() :]
    name, _, rest = line.partition(" ")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
    condition = guard[1] if guard else None
    if name == "mov.b32" and operands[0].startswith("{"):
        name = "mov.b32.split"  # its results are of another size
    if name == "bra":
        return _Statement(condition, operands[0], lambda: None, (), ())
    for pattern, targets, function in _INSTRUCTIONS:
        if match := pattern.fullmatch(name):
            names = [each for part in operands[:targets] for each in _names(part)]
            sources = tuple(_operand(part) for part in operands[targets:])
            return _Statement(
                condition, None, functools.partial(function, match), tuple(names), sources
            )
    raise NotImplementedError(f"{line=}: the emulator does not know this instruction")


def _names(text: str) -> Sequence[str]:
    return [name.strip() for name in text.strip("{}").split(",")]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        parts = [_operand(name) for name in _names(text)]
        return lambda registers: [part(registers) for part in parts]
    if text.startswith("[") and "," in text:  # a map of boxes, and a place in it
        parts = [_operand(name.strip(" {}")) for name in text.strip("[]").split(",")]
        return lambda registers: [part(registers) for part in parts]
    if text.startswith("["):
        name, _, offset = text.strip("[]").partition("+")
        number = int(offset or "0")
        return lambda registers: registers[name] + registers[name].dtype.type(number)
    if re.fullmatch(r"-?\d+|0[xf][0-9a-fA-F]+", text):
        constant = int(text.replace("f", "x", 1) if text.startswith("0f") else text, 0)
        return lambda registers: constant
    return lambda registers: registers[text]
