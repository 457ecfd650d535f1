"""Compiles our kernels with NVRTC and runs them beside PyTorch, through the driver alone."""

import ctypes
import ctypes.util
import glob
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = [HERE, HERE.parents[1] / "crates/peft-core/src/backend/cuda/kernels"] if len(HERE.parents) > 1 else [HERE]


def _nvrtc():
    places = [os.environ.get("SHANTY_NVRTC", "")]
    for folder in sys.path:
        places += glob.glob(f"{folder}/nvidia/cu13/lib/libnvrtc.so.1?")
        places += glob.glob(f"{folder}/nvidia/cuda_nvrtc/lib/libnvrtc.so.1?")
    places += ["libnvrtc.so.13", "libnvrtc.so.12"]
    for place in filter(None, places):
        try:
            for side in glob.glob(os.path.join(os.path.dirname(place), "libnvrtc-builtins.so.*")):
                ctypes.CDLL(side, mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise SystemExit("no libnvrtc; set SHANTY_NVRTC to one")


NVRTC = _nvrtc()


def source(names):
    texts = []
    for name in names:
        path = next(folder / f"{name}.cu" for folder in SOURCES if (folder / f"{name}.cu").exists())
        texts.append(path.read_text())
    return "".join(texts)


def compile(names, defines=(), architecture="sm_90a"):
    """Machine code, and the assembler's report."""
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    NVRTC.nvrtcCreateProgram(ctypes.byref(program), source(names).encode(), b"kernels.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--ptxas-options=-v", *defines]
    array = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    failed = NVRTC.nvrtcCompileProgram(program, len(options), array)
    NVRTC.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    NVRTC.nvrtcGetProgramLog(program, log)
    log = log.value.decode()
    if failed:
        raise RuntimeError(log)
    NVRTC.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    NVRTC.nvrtcGetCUBIN(program, code)
    NVRTC.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw, log


def compile_all(units):
    """Several at once: {key: (names, defines)} to {key: (code, log)}."""
    with ThreadPoolExecutor(8) as pool:
        futures = {key: pool.submit(compile, *unit) for key, unit in units.items()}
        return {key: future.result() for key, future in futures.items()}


class Card:
    """The driver. PyTorch must have made its context current."""

    def __init__(self):
        self.cuda = ctypes.CDLL("libcuda.so.1")

    def check(self, code, what):
        if code:
            name = ctypes.c_char_p()
            self.cuda.cuGetErrorName(code, ctypes.byref(name))
            raise RuntimeError(f"{what}: {name.value}")

    def module(self, code):
        module = ctypes.c_void_p()
        self.check(self.cuda.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        return module

    def kernel(self, module, name, shared=0):
        function = ctypes.c_void_p()
        self.check(self.cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), name)
        if shared:
            self.check(self.cuda.cuFuncSetAttribute(function, 8, shared), f"{name}: {shared} bytes shared")

        def launch(grid, block, *arguments, stream=None):
            import torch

            stream = torch.cuda.current_stream().cuda_stream if stream is None else stream
            pointers = (ctypes.c_void_p * len(arguments))(*[ctypes.addressof(a) for a in arguments])
            grid, block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
            self.check(
                self.cuda.cuLaunchKernel(function, *grid, *block, shared, ctypes.c_void_p(stream), pointers, None), name
            )

        return launch

    def tensor_map(self, tensor, columns, rows_in_box, head_dim):
        """A map of a matrix of bf16 [rows, columns] as stretches of columns: box = rows x one head."""
        stretch = 64 if head_dim % 64 == 0 else 32
        room = ctypes.create_string_buffer(128 + 64)
        address = (ctypes.addressof(room) + 63) & ~63
        dims = (ctypes.c_uint64 * 3)(stretch, tensor.shape[0], columns // stretch)
        strides = (ctypes.c_uint64 * 2)(tensor.stride(0) * 2, stretch * 2)
        box = (ctypes.c_uint32 * 3)(stretch, rows_in_box, head_dim // stretch)
        ones = (ctypes.c_uint32 * 3)(1, 1, 1)
        swizzle = 3 if stretch == 64 else 2
        code = self.cuda.cuTensorMapEncodeTiled(
            ctypes.c_void_p(address), 9, 3, ctypes.c_void_p(tensor.data_ptr()), dims, strides, box, ones, 0, swizzle, 3, 0
        )
        self.check(code, "cuTensorMapEncodeTiled")
        value = (ctypes.c_uint64 * 16).from_address(address)
        value.room = room
        return value


def u32(x):
    return ctypes.c_uint32(x)


def u64(x):
    return ctypes.c_uint64(x)


def f32(x):
    return ctypes.c_float(x)


def pointer(tensor):
    return ctypes.c_uint64(tensor.data_ptr() if tensor is not None else 0)
