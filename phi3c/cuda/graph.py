"""Decode steps as CUDA graphs: a step's hundreds of kernels are one launch.

A graph repeats what was launched while it was captured: the same kernels, grids and addresses. The
host code of a step looks at nothing but shapes, so a graph holds for one function, one cache and
one set of shapes, and what a step brings along is copied to where the graph reads it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm.runtime import Tensor
from tvm.runtime.vm import VirtualMachine

from ..errors import DeviceError
from .driver import call_driver
from .inputs import Inputs

MOST_GRAPHS = 16  # of a cache; the least recently used ones go
MOST_BYTES = 256 << 20  # that they work in; a single one may have more
_MET = 256  # shapes of a cache that are remembered before they have a graph
_BLOCKS = "block_ids"  # the input that grows with the context
_FEWEST_BLOCKS = 32
# Other threads, and Python when it collects garbage, may allocate and free meanwhile.
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the default stream does not wait for it
_ALLOC_STORAGE, _ALLOC_TENSOR = "vm.builtin.alloc_storage", "vm.builtin.alloc_tensor"
_WORKSPACE = "__TVMBackendAllocWorkspace"  # in libraries whose kernels take some

Values = dict[str, np.ndarray | Tensor]
_Key = tuple[str, tuple[tuple[int, ...], ...]]  # function, shapes of its inputs


class DecodeGraphs:
    """Those of a loaded model, by cache: they go with it.

    Shapes that come a second time are captured. failure: why there are no graphs (any more), None
    if there are; steps are launched kernel by kernel then, with the same results. captures: how
    many graphs were made.
    """

    def __init__(self, library: tvm_ffi.Module, path: Path, device: tvm.runtime.Device, most: int):
        """path: the library's; most: blocks that a step may list."""
        self.failure = _obstacle(path)
        self.captures = 0
        self._library, self._device, self._most = library, device, most
        self._vm: VirtualMachine | None = None
        self._caches: weakref.WeakKeyDictionary[Any, _Cache] = weakref.WeakKeyDictionary()
        self._paused = 0

    def run(
        self,
        name: str,
        inputs: Values,
        lasting: Sequence[Any],
        cache: Any,
        plain: Callable[[], Tensor],
    ) -> Tensor:
        """What `plain()` returns: the function of the library on the inputs and then `lasting`.

        lasting: arguments that stay where they are while `cache` lives, its pages among them.
        """
        if self.failure is not None or self._paused:
            return plain()
        inputs = self._rounded(inputs)
        key = name, tuple(tuple(map(int, value.shape)) for value in inputs.values())
        try:
            graph = self._caches.setdefault(cache, _Cache()).graph(
                key, lambda: self._captured(name, inputs, lasting)
            )
            if graph is not None:
                return graph.launch(inputs)
        except Exception as error:
            # Nothing of the step has run, or it is run again: it writes the same.
            self._give_up(error)
        return plain()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, steps are launched kernel by kernel."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def _rounded(self, inputs: Values) -> Values:
        """More blocks than are listed, up to a power of two, so that a growing context seldom needs
        another graph. Kernels find each sequence's blocks by block_indptr: nothing reads the rest,
        for which decode attention has workgroups that find no keys."""
        blocks = inputs[_BLOCKS]
        size = _FEWEST_BLOCKS
        while size < blocks.size:
            size *= 2
        size = max(blocks.size, min(size, self._most))
        padded = np.zeros(size, blocks.dtype)
        padded[: blocks.size] = blocks
        return inputs | {_BLOCKS: padded}

    def _captured(self, name: str, inputs: Values, lasting: Sequence[Any]) -> _Graph:
        if self._vm is None:  # of its own: another one's calls may be timed
            self._vm = VirtualMachine(self._library, self._device)
        graph = _Graph(self._vm, self._device, name, inputs, lasting)
        self.captures += 1
        return graph

    def _give_up(self, error: Exception) -> None:
        self.failure = (str(error).strip() or repr(error)).splitlines()[0]
        self._caches.clear()
        self._vm = None


class _Cache:
    """The graphs that work on one cache's pages."""

    def __init__(self):
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self._met: OrderedDict[_Key, None] = OrderedDict()

    def graph(self, key: _Key, capture: Callable[[], _Graph]) -> _Graph | None:
        """None the first time: that call loads the kernels, and many shapes come only once."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
        elif key in self._met:
            self._graphs[key] = capture()
            while len(self._graphs) > 1 and self._too_many():
                self._graphs.popitem(last=False)
        else:
            self._met[key] = None
            if len(self._met) > _MET:
                self._met.popitem(last=False)
            return None
        return self._graphs[key]

    def _too_many(self) -> bool:
        held = sum(graph.bytes for graph in self._graphs.values())
        return len(self._graphs) > MOST_GRAPHS or held > MOST_BYTES


class _Graph:
    """A captured call, the memory that it works in (`bytes`), and that of its inputs."""

    def __init__(
        self,
        vm: VirtualMachine,
        device: tvm.runtime.Device,
        name: str,
        inputs: Values,
        lasting: Sequence[Any],
    ):
        self._device = device
        self._embeds = {
            name: tvm.runtime.empty(value.shape, value.dtype, device)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }
        self._inputs = Inputs(device)
        arguments = [*self._put(inputs), *lasting]
        self._storage = _Storage()
        vm.set_instrument(self._storage)
        try:
            # For real first, holding all storage as the captured call will: then that one finds
            # enough in the pool, and allocates nothing. Twice, as a machine keeps its last result.
            for _ in range(2):
                vm[name](*arguments)
                self._storage.release()
            self._exec, self._output = _capture(device, lambda: vm[name](*arguments))
        finally:
            vm.set_instrument(lambda *_: None)  # it would keep the storage
        self.bytes = self._storage.bytes

    def launch(self, inputs: Values) -> Tensor:
        """The function's output, in memory of its own: the graph's is written by the next launch.

        Copies are put in the order of TVM's current stream, as the launch is.
        """
        self._put(inputs)
        stream = tvm_ffi.get_raw_stream(self._device)
        call_driver("cuGraphLaunch", self._exec.handle, ctypes.c_void_p(stream))
        result = self._storage.tensor(self._output.shape, self._output.dtype)
        self._output.copyto(result)
        return result

    def _put(self, inputs: Values) -> list[Tensor]:
        """Where the graph reads them: inputs of one set of shapes stay where they are."""
        for name, memory in self._embeds.items():
            inputs[name].copyto(memory)
        arrays = {name: v for name, v in inputs.items() if name not in self._embeds}
        there = self._embeds | self._inputs.tensors(arrays)
        return [there[name] for name in inputs]


class _Storage:
    """Sees what a virtual machine allocates (its instrument), and keeps it from being given to
    others, as the pool that it comes from would do after a call."""

    def __init__(self):
        self.bytes = 0
        self._held: list[Any] = []
        self._arguments: tuple[Any, ...] = ()

    def __call__(self, function: Any, name: str, before: bool, result: Any, *arguments: Any):
        if name == _ALLOC_STORAGE and not before:
            self._held.append(result)
            self.bytes += int(arguments[1][0])
            self._arguments = arguments

    def release(self) -> None:
        self._held.clear()
        self.bytes = 0

    def tensor(self, shape: Sequence[int], dtype: str) -> Tensor:
        """One from the same pool, where it goes back to."""
        machine, _, device, hint, *scope = self._arguments
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        storage = _builtin(_ALLOC_STORAGE)(machine, tvm_ffi.Shape([size]), device, hint, *scope)
        return _builtin(_ALLOC_TENSOR)(storage, 0, shape, dtype)


class _Executable:
    """A graph that can be launched; freed with the object."""

    def __init__(self, graph: ctypes.c_void_p):
        self.handle = ctypes.c_void_p()
        call_driver(
            "cuGraphInstantiateWithFlags", ctypes.byref(self.handle), graph, ctypes.c_ulonglong(0)
        )
        weakref.finalize(self, _destroy, "cuGraphExecDestroy", self.handle)


def _capture(device: tvm.runtime.Device, call: Callable[[], Tensor]) -> tuple[_Executable, Tensor]:
    """What `call` launches, and what it returns; nothing of it has run."""
    stream, graph = ctypes.c_void_p(), ctypes.c_void_p()
    call_driver("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
    try:
        call_driver("cuStreamBeginCapture_v2", stream, _RELAXED)
        try:
            with tvm_ffi.use_raw_stream(device, stream.value):
                output = call()
        except BaseException:
            _destroy("cuStreamEndCapture", stream, ctypes.byref(graph))
            raise
        call_driver("cuStreamEndCapture", stream, ctypes.byref(graph))
        return _Executable(graph), output
    finally:
        if graph:
            _destroy("cuGraphDestroy", graph)
        _destroy("cuStreamDestroy_v2", stream)


def _destroy(name: str, *arguments: Any) -> None:
    """Whatever the driver says: it may be gone before us, or be in the middle of an error."""
    try:
        call_driver(name, *arguments)
    except DeviceError:
        pass


def _obstacle(library: Path) -> str | None:
    """TVM takes workspace from a pool that frees it at will: a graph would write to it still."""
    try:
        ctypes.c_void_p.in_dll(ctypes.CDLL(str(library)), _WORKSPACE)
    except ValueError:
        return None
    return "the artifact was compiled by an older phi3c, whose kernels allocate memory"


def _builtin(name: str) -> tvm_ffi.Function:
    return tvm_ffi.get_global_func(name)
