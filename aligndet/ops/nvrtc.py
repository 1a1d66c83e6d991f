"""CUDA source to machine code, at first use, by the compiler that comes with torch's CUDA wheels; kept on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "csrc"
OPTIONS = ("--std=c++17", "--extra-device-vectorization")


class NoKernelError(RuntimeError):
    """Our own kernel cannot be had on this machine, and why."""


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a call of ``cuda.bindings``, which returns (status, value) or (status,)."""
    status, *values = result
    if int(status) != 0:
        raise NoKernelError(status.name)
    return values[0] if values else None


def nvrtc() -> Any:
    """The compiler's module.

    Raises:
        NoKernelError: ``cuda.bindings`` or the library behind it is not installed.
    """
    try:
        from cuda.bindings import nvrtc as module

        module.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:
        raise NoKernelError(f"no NVRTC: {error}") from error
    return module


def version() -> tuple[int, int]:
    """Of NVRTC: (major, minor)."""
    status, major, minor = nvrtc().nvrtcVersion()
    checked((status,))
    return major, minor


def architectures() -> list[int]:
    """Compute capabilities NVRTC knows, as 10 * major + minor, ascending."""
    return sorted(checked(nvrtc().nvrtcGetSupportedArchs()))


def target_of(capability: tuple[int, int]) -> str:
    """NVRTC's name of the code for a GPU: its own, or for GPUs newer than the compiler the newest that exists.

    The second is no machine code but PTX, which the driver translates.

    Raises:
        NoKernelError: the GPU is older than what NVRTC still knows.
    """
    known, wanted = architectures(), 10 * capability[0] + capability[1]
    if wanted in known:
        return f"sm_{wanted}"
    if wanted > known[-1]:
        return f"compute_{known[-1]}"
    raise NoKernelError(f"NVRTC {'.'.join(map(str, version()))} has no code for compute capability {capability}")


def compile_source(name: str, target: str) -> bytes:
    """Machine code (``sm_…``) or PTX (``compute_…``) of ``csrc/NAME.cu``; needs no GPU.

    Raises:
        NoKernelError: with the compiler's own words.
    """
    library = nvrtc()
    headers = {path.name: path.read_bytes() for path in sorted(SOURCES.glob("*.h"))}
    source = (SOURCES / f"{name}.cu").read_bytes()
    texts, names = list(headers.values()), [header.encode() for header in headers]
    program = checked(library.nvrtcCreateProgram(source, f"{name}.cu".encode(), len(texts), texts, names))
    try:
        options = [option.encode() for option in (*OPTIONS, f"--gpu-architecture={target}")]
        (status,) = library.nvrtcCompileProgram(program, len(options), options)
        if int(status) != 0:
            log = b" " * checked(library.nvrtcGetProgramLogSize(program))
            checked(library.nvrtcGetProgramLog(program, log))
            raise NoKernelError(f"{status.name}: {log.decode(errors='replace').strip()}")
        if target.startswith("sm_"):
            code = b" " * checked(library.nvrtcGetCUBINSize(program))
            checked(library.nvrtcGetCUBIN(program, code))
        else:
            code = b" " * checked(library.nvrtcGetPTXSize(program))
            checked(library.nvrtcGetPTX(program, code))
        return code
    finally:
        library.nvrtcDestroyProgram(program)


def cache_path(name: str, target: str) -> Path:
    """Where the code lies on disk: another file for another source, target, compiler or option."""
    digest = hashlib.sha256(repr((name, target, version(), OPTIONS)).encode())
    for path in [SOURCES / f"{name}.cu", *sorted(SOURCES.glob("*.h"))]:
        digest.update(path.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "aligndet" / f"{name}-{target}-{digest.hexdigest()[:16]}.bin"


def cached_code(name: str, target: str, *, fresh: bool = False) -> bytes:
    """``compile_source``, from the disk where it has been done before.

    Args:
        fresh: compile again, and replace what is on the disk.
    """
    # Without a home folder there is no cache, which is no reason to fail; RuntimeError is what Path.home() raises.
    try:
        path = cache_path(name, target)
        if not fresh:
            return path.read_bytes()
    except (OSError, RuntimeError) as error:
        if isinstance(error, NoKernelError):
            raise
    code = compile_source(name, target)
    try:
        path = cache_path(name, target)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Complete under another name first: several processes may be at it.
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(code)
        os.replace(temporary, path)
    except (OSError, RuntimeError):
        pass  # a folder that cannot be written to costs the compilation in every process, nothing else
    return code
