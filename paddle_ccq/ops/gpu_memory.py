# SPDX-License-Identifier: Apache-2.0
"""Memory of the first GPU through the CUDA driver, for the compiled library without a framework."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np

from ..errors import CcqError

_NAMES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")
# Names with _v2 are those that cuda.h gives the plain ones.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (ctypes.POINTER(ctypes.c_int), ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_int),
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuMemAlloc_v2": (ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t),
    "cuMemFree_v2": (ctypes.c_uint64,),
    "cuMemcpyHtoD_v2": (ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t),
    "cuMemcpyDtoH_v2": (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


@cache
def _driver() -> Any:
    for name in _NAMES:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        for function, arguments in _ARGUMENTS.items():
            getattr(driver, function).argtypes = arguments
        return driver
    raise CcqError("--device gpu: no CUDA driver (libcuda.so.1) on this machine; use --device cpu")


class Memory:
    """A piece of device memory, freed with its last reference."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self.device, self.nbytes = device, nbytes
        address = ctypes.c_uint64()
        device.call("cuMemAlloc_v2", ctypes.byref(address), max(1, nbytes))
        self.address = address.value

    def write(self, array: np.ndarray) -> None:
        """From a C-contiguous array that fits."""
        assert array.flags.c_contiguous and array.nbytes <= self.nbytes
        self.device.call("cuMemcpyHtoD_v2", self.address, array.ctypes.data, array.nbytes)

    def read(self, array: np.ndarray) -> None:
        """Fill a C-contiguous array; waits for all that was launched before."""
        assert array.flags.c_contiguous and array.nbytes <= self.nbytes
        self.device.call("cuMemcpyDtoH_v2", array.ctypes.data, self.address, array.nbytes)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            self.device.driver.cuCtxSetCurrent(self.device.context)
            self.device.driver.cuMemFree_v2(self.address)


class Device:
    """The first GPU, in the context that the library's CUDA runtime uses too.

    Copies and launches go to the default stream, in the order of the calls.
    """

    def __init__(self, driver: Any = None) -> None:
        self.driver = driver or _driver()
        number, context = ctypes.c_int(), ctypes.c_void_p()
        self._check("cuInit", self.driver.cuInit(0))
        self._check("cuDeviceGet", self.driver.cuDeviceGet(ctypes.byref(number), 0))
        code = self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
        self._check("cuDevicePrimaryCtxRetain", code)
        self.context = context
        self._scratch: dict[str, Memory] = {}

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver's API by its name, in the first GPU's context.

        Raises:
            CcqError: with the driver's own text, for any code but success.
        """
        # A context is current to one thread; loading and generating are two.
        self._check("cuCtxSetCurrent", self.driver.cuCtxSetCurrent(self.context))
        self._check(function, getattr(self.driver, function)(*arguments))

    def upload(self, array: np.ndarray) -> Memory:
        """A copy of an array."""
        array = np.ascontiguousarray(array)
        memory = Memory(self, array.nbytes)
        memory.write(array)
        return memory

    def scratch(self, name: str, nbytes: int) -> Memory:
        """Memory under a name, at least so large, kept for the next call."""
        found = self._scratch.get(name)
        if found is None or found.nbytes < nbytes:
            self._scratch.pop(name, None)
            found = self._scratch[name] = Memory(self, nbytes)
        return found

    def _check(self, function: str, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(code, ctypes.byref(text))
            said = (text.value or b"unknown error").decode()
            raise CcqError(f"--device gpu: {function}: {said} (CUDA error {code})")
