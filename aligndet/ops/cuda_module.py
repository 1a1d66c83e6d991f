"""Our CUDA kernels on a GPU: loaded once per device, launched on torch's current stream."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from aligndet.ops.nvrtc import NoKernelError, cached_code, checked, target_of

LOGGER = logging.getLogger("aligndet")
THREADS = 128  # per block


@cache
def say_once(level: int, text: str) -> None:
    """One log line per process and text."""
    LOGGER.log(level, text)


def blocks_of(items: int, lanes: int) -> tuple[int, tuple[int, int]]:
    """How ``items`` results, each shared by ``lanes`` threads, are launched.

    Args:
        items: at least 1.
        lanes: threads one result could use; rounded up to a power of two, at most a warp of 32.

    Returns:
        Number of blocks; threads of a block (per result, results).
    """
    across = 1 << (min(max(lanes, 1), 32) - 1).bit_length()
    return math.ceil(items / (THREADS // across)), (across, THREADS // across)


class Module:
    """Kernels of one source file on one device.

    Args:
        name: of ``csrc/NAME.cu``.
        device: index.

    Raises:
        NoKernelError: it cannot be compiled or loaded here.
    """

    def __init__(self, name: str, device: int) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise NoKernelError(f"no cuda.bindings: {error}") from error
        self.driver: Any = driver
        self.device = device
        self.target = target_of(torch.cuda.get_device_capability(device))
        self.functions: dict[str, Any] = {}
        self.context = checked(driver.cuDevicePrimaryCtxRetain(device))
        with self._entered():
            try:
                self.module = checked(driver.cuModuleLoadData(cached_code(name, self.target)))
            except NoKernelError:
                # The file in the cache may be damaged; a driver too old for this compiler fails again.
                self.module = checked(driver.cuModuleLoadData(cached_code(name, self.target, fresh=True)))

    def launch(self, name: str, items: int, lanes: int, parameters: ctypes.Structure) -> None:
        """Start a kernel that takes one struct; returns at once."""
        with self._entered():
            if name not in self.functions:
                self.functions[name] = checked(self.driver.cuModuleGetFunction(self.module, name.encode()))
            blocks, (across, down) = blocks_of(items, lanes)
            # The driver copies the struct before it returns.
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
            stream = torch.cuda.current_stream(self.device).cuda_stream
            shape = (blocks, 1, 1, across, down, 1)
            checked(self.driver.cuLaunchKernel(self.functions[name], *shape, 0, stream, ctypes.addressof(pointers), 0))

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """The device's context is the thread's current one, whatever torch's device was and will be again."""
        with torch.cuda.device(self.device):
            # Where torch has not made it so yet: in a thread of autograd, say.
            if int(checked(self.driver.cuCtxGetCurrent())) != int(self.context):
                checked(self.driver.cuCtxSetCurrent(self.context))
            yield


@cache
def module_for(name: str, device: int) -> Module | None:
    """The kernels on a device; None, with one log line, where torch's or torchvision's have to do."""
    try:
        module = Module(name, device)
    except (NoKernelError, RuntimeError, OSError) as error:
        say_once(logging.WARNING, f"{name}: torchvision's op, ours cannot be used here ({error})")
        return None
    say_once(logging.INFO, f"{name}: our CUDA kernel for {module.target}")
    return module
