"""What the launches call of Pallas: a grid of blocks, run one after the other."""

import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np

from tests.emulator.block import Block
from tests.emulator.global_memory import GlobalMemory
from tests.emulator.mlir import Index, Reference
from tests.emulator.shared_memory import Watcher
from tests.emulator.warpgroup import current

Code = Callable[..., None]


class Mutable:
    """An array that a launch changes in place, as `jax.new_ref` makes it."""

    def __init__(self, array: Any) -> None:
        self.array = np.array(array)


class Launcher:
    """Takes the place of modules of Pallas.

    Attributes:
        seed: of the order in which warpgroups run.
        watchers: of accesses to shared memory.
    """

    def __init__(self) -> None:
        self.seed = 0
        self.watchers: list[Watcher] = []
        self.plgpu = types.SimpleNamespace(
            kernel=self._kernel,
            inline_mgpu=lambda arg_types: _inline_mgpu,
            set_max_registers=_set_max_registers,
            SMEM=lambda shape, dtype: int(np.prod(shape)) * np.dtype(dtype).itemsize,
            RefType=plgpu.RefType,
            Layout=plgpu.Layout,
            CompilerParams=plgpu.CompilerParams,
            LoweringSemantics=plgpu.LoweringSemantics,
        )
        self.pl = types.SimpleNamespace(when=lambda holds: lambda code: code() if holds else None)
        self.jax = types.SimpleNamespace(
            new_ref=Mutable, freeze=lambda ref: ref.array, ShapeDtypeStruct=jax.ShapeDtypeStruct
        )
        self.lax = types.SimpleNamespace(axis_index=_axis_index)

    def _kernel(
        self,
        code: Code,
        *,
        out_type: Sequence[Any],
        grid: tuple[int],
        grid_names: tuple[str],
        num_threads: int = 1,
        thread_name: str = "warpgroup",
        scratch_types: Sequence[int] = (),
        compiler_params: Any,
        cluster: tuple[int] = (1,),
        cluster_names: tuple[str, ...] = (),
    ) -> Callable[..., list[np.ndarray]]:
        def launch(*operands: Any) -> list[np.ndarray]:
            updated = [i for i, each in enumerate(operands) if isinstance(each, Mutable)]
            given = [
                each.array if isinstance(each, Mutable) else np.asarray(each) for each in operands
            ]
            results = [np.empty(each.shape, each.dtype) for each in out_type]
            memory = GlobalMemory(given, results, updated)
            arrays = [Reference(address, 64) for address in memory.addresses]
            for number in range(*grid):
                block = Block(
                    number,
                    memory,
                    scratch_types,
                    num_threads,
                    seed=self.seed,
                    watchers=self.watchers,
                    blocks=cluster[0],
                )
                shared = [Reference(address, 32) for address in block.shared.addresses]
                block.run(lambda shared=shared: code(*arrays, *shared))  # type: ignore[misc]
            for i in updated:
                operands[i].array = memory.operand(i, given[i])
            return memory.results(results)

        return launch


def _inline_mgpu(code: Code) -> Code:
    return lambda *arguments: code(None, *arguments)


def _axis_index(name: str) -> Index:
    group = current()
    places = {"warpgroup": group.number, "part": group.rank}
    return Index(places.get(name, group.block.number))


def _set_max_registers(count: int, *, action: str) -> None:
    group = current()
    group.block.registers[group.index] = count
