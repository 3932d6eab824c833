"""Copies of the kernels' modules that run on the emulator, beside the modules themselves."""

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tests.emulator import arith, boxes, mlir
from tests.emulator.control import Control
from tests.emulator.launch import Launcher

_PACKAGE = "pallas_kernels"


class Kernels(NamedTuple):
    """The copies.

    Attributes:
        modules: by their names within `pallas_kernels`.
        launcher: that their launches go to.
    """

    modules: Mapping[str, Any]
    launcher: Launcher


@functools.cache
def kernels() -> Kernels:
    """The copies: of the same files, and reachable from here alone.

    Their calls of MLIR and of Pallas are replaced, and loops and branches, whose bodies MLIR runs
    once. All that the kernels do beyond that is their own code.
    """
    launcher = Launcher()
    with _new_modules():
        simt = importlib.import_module(f"{_PACKAGE}.device.simt")
        _replace(simt, mgpu_utils=mlir.mgpu_utils, ir=mlir.ir, arith=arith, llvm=mlir.llvm)
        # Before others take them from there by name.
        control = Control(simt)
        _replace(
            simt,
            loop=control.loop,
            when=control.when,
            branch=control.branch,
            either=control.either,
        )
        memory = importlib.import_module(f"{_PACKAGE}.device.memory")
        _replace(memory, mgpu_utils=mlir.mgpu_utils, llvm=mlir.llvm)
        _replace(
            importlib.import_module(f"{_PACKAGE}.device.boxes"),
            _box_map=lambda *arguments: simt.Value(boxes.box_map(*arguments)),
        )
        _replace(importlib.import_module(f"{_PACKAGE}.device.wgmma"), llvm=mlir.llvm)
        program = importlib.import_module(f"{_PACKAGE}.sparse_decode.program")
        _replace(program, plgpu=launcher.plgpu, pl=launcher.pl, lax=launcher.lax)
        join = importlib.import_module(f"{_PACKAGE}.sparse_decode.join")
        _replace(join, plgpu=launcher.plgpu, lax=launcher.lax)
        many = importlib.import_module(f"{_PACKAGE}.device.join")
        _replace(many, plgpu=launcher.plgpu, lax=launcher.lax)
        topk = importlib.import_module(f"{_PACKAGE}.select_topk.launch")
        _replace(topk, plgpu=launcher.plgpu, lax=launcher.lax)
        codec = importlib.import_module(f"{_PACKAGE}.cache_codec.call")
        _replace(codec, plgpu=launcher.plgpu, lax=launcher.lax, jax=launcher.jax)
        pages = importlib.import_module(f"{_PACKAGE}.page_copy.call")
        _replace(pages, plgpu=launcher.plgpu, lax=launcher.lax, jax=launcher.jax)
        buffer = importlib.import_module(f"{_PACKAGE}.hot_buffer.call")
        _replace(buffer, plgpu=launcher.plgpu, lax=launcher.lax, jax=launcher.jax)
        query = importlib.import_module(f"{_PACKAGE}.index_query.call")
        _replace(query, plgpu=launcher.plgpu, lax=launcher.lax)
        importlib.import_module(f"{_PACKAGE}.select_topk.call")
        importlib.import_module(f"{_PACKAGE}.sparse_prefill.call")
        importlib.import_module(f"{_PACKAGE}.indexer_logits.call")
        importlib.import_module(f"{_PACKAGE}.indexer_topk.call")
        importlib.import_module(f"{_PACKAGE}.dense_decode.call")
        gqa = importlib.import_module(f"{_PACKAGE}.gqa_decode.call")
        _replace(gqa, plgpu=launcher.plgpu, lax=launcher.lax)
        modules = {name.removeprefix(f"{_PACKAGE}."): each for name, each in _loaded().items()}
    return Kernels(modules, launcher)


@contextlib.contextmanager
def _new_modules() -> Iterator[None]:
    """Within, imports find no module of the package; afterwards those of before, if any."""
    before = _loaded()
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)


def _loaded() -> dict[str, Any]:
    return {
        name: module
        for name, module in sys.modules.items()
        if name == _PACKAGE or name.startswith(f"{_PACKAGE}.")
    }


def _replace(module: Any, **names: Any) -> None:
    for name, value in names.items():
        if not hasattr(module, name):
            raise AttributeError(f"{module.__name__} has no {name}: expected it to be replaced")
        setattr(module, name, value)
