"""A GPU that is not there: the kernel is compiled, launched and run as on one, on CPU tensors.

Everything but the device is real: Triton's just-in-time path (specialisation, caches, ptxas), its
launcher in C with the arguments as it packs them, and the compiled code. Beneath it is a libcuda of
a few functions (emulated_driver.c), and the code's PTX runs in ptx_machine.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from memory_order import RankMemory
from ptx_arithmetic import Array
from ptx_machine import Blocks, Memory, Program
from recorded_graph import run_and_record
from tile_copy_module import imported_tile_copy
from torch import Tensor

from fastvideo_comm.kernels import strided_copy

# function, blocks, threads of a block, bytes of shared memory of a block, parameters
_LAUNCHED = ctypes.CFUNCTYPE(
    None,
    *(ctypes.c_size_t, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p),
)


class EmulatedGPU:
    """What ran on it: kernels that were loaded, launches, and the bytes that these read and wrote,
    in how many 32-byte sectors.

    A kernel may read the storages of the tensors that it copies from, and write those of the
    tensors that it copies to.
    """

    def __init__(self) -> None:
        self.num_kernels = self.num_launches = 0
        self.loaded = self.stored = self.sectors = 0
        self.edit: Callable[[str], str] = str  # of the code of kernels that are loaded
        self._programs: dict[int, Program] = {}
        self._here = threading.local()  # ranks as threads launch at the same time

    def load(self, _: Any, function: int, __: str, files: dict[str, str], ___: str) -> None:
        """Triton's hook behind the loading of a compiled kernel."""
        (ptx,) = (path for name, path in files.items() if name.endswith(".ptx"))
        self._programs[function] = Program(self.edit(Path(ptx).read_text()))
        self.num_kernels += 1

    def launch(
        self, function: int, num_blocks: int, num_threads: int, shared_bytes: int, parameters: Any
    ) -> None:
        """What the driver is asked for."""
        try:
            program = self._programs[function]
            if num_threads != program.num_threads:
                raise ValueError(f"{num_threads} threads for a kernel of {program.num_threads}")
            values = {
                name: int.from_bytes(ctypes.string_at(parameters[i], size), "little")
                for i, (name, size) in enumerate(program.parameters)
            }
            memory = self._here.memory

            def run() -> None:
                blocks = Blocks(program, values, num_blocks, shared_bytes, *memory)
                blocks.run()
                self.num_launches += 1
                self.loaded += blocks.loaded
                self.stored += blocks.stored
                self.sectors += blocks.sectors
                self._here.moved = [blocks.loaded, blocks.stored, blocks.sectors]

            run_and_record(run)
        except BaseException as error:  # must not pass through the C code that calls
            self._here.error = error

    @property
    def last_moved(self) -> list[int]:
        """Bytes that this thread's last launch read and wrote, and the sectors."""
        moved: list[int] = self._here.moved
        return moved

    @contextlib.contextmanager
    def copies(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Around the launch that copies them."""
        dsts, srcs = zip(*pairs, strict=True)
        with self.accesses([bytes_of(src) for src in srcs], [bytes_of(dst) for dst in dsts]):
            yield

    @contextlib.contextmanager
    def accesses(
        self, readable: Memory, writable: Memory, memory: RankMemory | None = None
    ) -> Iterator[None]:
        """Around a launch of this thread: what the kernel may read and write."""
        self._here.memory = (readable, writable, memory)
        self._here.error = None
        yield
        if self._here.error is not None:
            raise self._here.error


def bytes_of(tensor: Tensor) -> tuple[int, Array]:
    """The storage of a tensor, as the machine takes it."""
    storage = tensor.untyped_storage()
    address = storage.data_ptr()
    data = np.ctypeslib.as_array((ctypes.c_uint8 * storage.nbytes()).from_address(address))
    return address, data


@contextlib.contextmanager
def emulated_gpu(directory: Path, capability: int = 90) -> Iterator[EmulatedGPU]:
    """While it lasts, Triton's kernel on CPU tensors is what it would be on a GPU.

    In `directory` it builds; one for the whole process, because a library is loaded once.
    """
    if torch.cuda.is_available():
        pytest.skip("a GPU is here, and its driver where the emulated one would be")
    triton = pytest.importorskip("triton", reason="the kernel needs triton")
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    library = _emulated_driver(directory, Path(driver.__file__).parent / "include")
    gpu = EmulatedGPU()
    launched = _LAUNCHED(gpu.launch)  # lives as long as it may be called
    library.set_launched(launched)
    with (
        triton.knobs.nvidia.scope(),
        triton.knobs.cache.scope(),
        triton.knobs.runtime.scope(),
        pytest.MonkeyPatch.context() as patch,
    ):
        triton.knobs.nvidia.libcuda_path = str(directory)
        triton.knobs.cache.dir = str(directory / "cache")
        triton.knobs.runtime.kernel_load_end_hook = gpu.load
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        active = object.__new__(driver.CudaDriver)  # its __init__ asks torch.cuda
        active.utils = driver.CudaUtils()
        active.launcher_cls = driver.CudaLauncher
        active.get_current_target = lambda: target
        active.get_current_device = lambda: 0
        active.get_current_stream = lambda device: 0
        # Not set_active: its inverse asks for a GPU.
        patch.setattr(triton.runtime.driver, "_active", active)
        patch.setattr(strided_copy, "_TRITON_DEVICES", (*strided_copy._TRITON_DEVICES, "cpu"))
        # A kernel that dies asks the active driver to unload it, which may be another by then.
        triton.compiler.CompiledKernel.__del__ = lambda _: None
        with _module_launching_on(gpu):
            yield gpu


@contextlib.contextmanager
def _module_launching_on(gpu: EmulatedGPU) -> Iterator[None]:
    with imported_tile_copy(interpret=False) as module, pytest.MonkeyPatch.context() as patch:
        launch = module._launch

        def watched(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
            with gpu.copies(pairs):
                launch(pairs)

        patch.setattr(module, "_launch", watched)
        yield


def _emulated_driver(directory: Path, include: Path) -> ctypes.CDLL:
    library = directory / "libcuda.so.1"
    if not library.exists():
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            pytest.skip("Triton's launcher needs a C compiler, and none is here")
        options = ["-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
        source = Path(__file__).with_name("emulated_driver.c")
        subprocess.run([compiler, *options, "-o", str(library), str(source)], check=True)
    return ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
