"""Dense CPU tensors and numpy arrays as (dtype name, shape, bytes), and back with every check made.

Values travel, in row-major order; strides, `requires_grad` and shared storage do not.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
from typing import Any

import torch

_DTYPE_NAMES = """
    bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64
    complex32 complex64 complex128 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz
    float8_e8m0fnu
""".split()  # noqa: SIM905 - a list of literals would be one per line
_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES}
_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}

# No object arrays and no records: every accepted dtype is plain bytes.
_NUMPY_DTYPE = re.compile(r"[<>|][biufcmMSU][1-9][0-9]{0,8}(\[[0-9]{0,9}[A-Za-z]{1,7}\])?")
_NUMPY_KINDS = "biufcmMSU"
_MAX_CODE_POINT = 0x10FFFF
_MAX_DIMS = 64
_SIZES = range(2**63)
# All dtypes that torch has now. `getattr(torch, name)` could import a module that a message names.
_ALL_DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in list(vars(torch).values())
    if isinstance(value, torch.dtype)
}
_DEVICE = re.compile(r"[a-z]{1,20}(:[0-9]{1,3})?")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without the module: `float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: object) -> torch.dtype:
    """Return the dtype with this name; ValueError where torch has none."""
    dtype = _ALL_DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError("dtype must be the name of a torch dtype")
    return dtype


def device_from_name(name: object) -> torch.device:
    """Return the device with this name; ValueError where it is not `type` or `type:index`."""
    if not isinstance(name, str) or not _DEVICE.fullmatch(name):
        raise ValueError("device must be the name of a torch device")
    return torch.device(name)


def tensor_fields(tensor: torch.Tensor) -> tuple[str, list[int], memoryview]:
    """Return dtype name, shape and bytes of a tensor; of a contiguous one the bytes are a view.

    Raises:
        TypeError: The tensor is not a dense one on the CPU with a dtype that has plain bytes.
    """
    if tensor.device.type != "cpu" or tensor.layout is not torch.strided:
        raise TypeError(f"a tensor must be dense and on the CPU, got {_kind(tensor)}")
    if tensor.dtype not in _NAMES:
        raise TypeError(f"a tensor must have a dtype of plain bytes, got {_kind(tensor)}")
    if tensor.dim() > _MAX_DIMS:
        raise TypeError(f"a tensor must have at most {_MAX_DIMS} dims, got {tensor.dim()}")
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    num_bytes = plain.numel() * plain.element_size()
    if not num_bytes:
        return _NAMES[plain.dtype], list(plain.shape), memoryview(b"")
    data = (ctypes.c_ubyte * num_bytes).from_address(plain.data_ptr())
    data.owner = plain  # type: ignore[attr-defined] # from_address keeps nothing alive
    return _NAMES[plain.dtype], list(plain.shape), memoryview(data).cast("B")


def build_tensor(name: object, shape: object, data: memoryview) -> torch.Tensor:
    """Return the tensor of these fields; it shares `data` where `data` is writable.

    Raises:
        ValueError: The fields do not describe a tensor.
    """
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"a tensor's dtype must be one of {', '.join(_DTYPES)}")
    sizes = _checked_shape(shape, dtype.itemsize, len(data))
    if not len(data):
        return torch.empty(sizes, dtype=dtype)
    raw = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)
    if dtype is torch.bool and bool((raw > 1).any()):
        raise ValueError("a bool tensor must have bytes 0 and 1 only")
    return raw.view(dtype).reshape(sizes)


def is_array_type(kind: type) -> bool:
    """Whether this type is numpy's array; False as long as nobody has imported numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and kind is numpy.ndarray


def array_fields(array: Any) -> tuple[str, list[int], memoryview]:
    """Return dtype string, shape and bytes of a numpy array.

    Raises:
        TypeError: The dtype is not one of plain bytes (object arrays, records).
    """
    dtype = array.dtype
    if dtype.hasobject or dtype.fields is not None or dtype.kind not in _NUMPY_KINDS:
        raise TypeError(f"an array must have a dtype of plain bytes, got {dtype}")
    if not _NUMPY_DTYPE.fullmatch(dtype.str):
        raise TypeError(f"an array must have a dtype with a plain name, got {dtype}")
    data = array.tobytes() if array.nbytes else b""
    return dtype.str, list(array.shape), memoryview(data)


def build_array(name: object, shape: object, data: memoryview) -> Any:
    """Return the numpy array of these fields; it shares `data` where `data` is writable.

    Raises:
        ValueError: The fields do not describe an array.
    """
    numpy = sys.modules.get("numpy")  # torch imports numpy; a message must not
    if numpy is None:
        raise ValueError("numpy must be imported on this rank")
    if not isinstance(name, str) or not _NUMPY_DTYPE.fullmatch(name):
        raise ValueError("an array's dtype must be one of plain bytes")
    dtype = numpy.dtype(name)
    sizes = _checked_shape(shape, dtype.itemsize, len(data))
    if not len(data):
        return numpy.empty(sizes, dtype)
    raw = numpy.frombuffer(bytearray(data) if data.readonly else data, numpy.uint8)
    if dtype.kind == "b" and bool((raw > 1).any()):
        raise ValueError("a bool array must have bytes 0 and 1 only")
    if dtype.kind == "U":
        points = raw.view(dtype.byteorder.replace("|", "=") + "u4")
        if int(points.max()) > _MAX_CODE_POINT:
            raise ValueError("a str array must hold code points only")
    return raw.view(dtype).reshape(sizes)


def _checked_shape(shape: object, item_bytes: int, num_bytes: int) -> list[int]:
    # The errors do not show what was received: a number of a million digits takes minutes to print.
    if not isinstance(shape, list) or len(shape) > _MAX_DIMS:
        raise ValueError(f"shape must be a list of at most {_MAX_DIMS} sizes")
    if any(type(n) is not int or n not in _SIZES for n in shape):
        raise ValueError("shape must hold sizes below 2**63 only")
    if math.prod(shape) * item_bytes != num_bytes:
        raise ValueError(f"shape must match the {num_bytes} bytes that came")
    return shape


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
