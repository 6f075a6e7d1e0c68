"""PTX → cubin with libnvJitLink through ctypes. No driver, no GPU; not cuda.bindings, whose version torch pins."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from builder.errors import AssembleError, ToolchainError

DISTRIBUTION = "nvidia-nvjitlink-cu12"
SONAME = "libnvJitLink.so.12"
INPUT_PTX = 2  # nvJitLinkInputType
# Architectures, and the first CUDA version, as cuDriverGetVersion states it, whose driver knows the chip.
ARCHS = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_90"), 12000),
    **dict.fromkeys(("sm_100", "sm_120"), 12080),
    **dict.fromkeys(("sm_103", "sm_121"), 12090),
}
# Of nvJitLinkResult: only names for the message; the log says the rest.
RESULTS = ("success", "unrecognized option", "missing arch", "invalid input", "PTX compile", "NVVM compile", "internal")


@dataclass(frozen=True)
class Assembled:
    """A cubin and nvJitLink's info log (registers, spills, stack, static shared memory)."""

    cubin: bytes
    log: str


@cache
def library() -> ctypes.CDLL:
    """libnvJitLink.so.12 of the nvidia-nvjitlink-cu12 wheel beside this Python. ToolchainError if it is not there."""
    try:
        files = metadata.distribution(DISTRIBUTION).files or []
        path = next(f.locate() for f in files if f.name == SONAME)
        lib = ctypes.CDLL(str(path))
    except (metadata.PackageNotFoundError, StopIteration, OSError) as error:
        raise ToolchainError(
            f"{SONAME} of {DISTRIBUTION} cannot be loaded ({error!r}): pip install {DISTRIBUTION}"
        ) from None
    handle, size_p = c_void_p, POINTER(c_size_t)
    signatures: dict[str, tuple[object, ...]] = {
        "Create": (POINTER(handle), c_uint, POINTER(c_char_p)),
        "Destroy": (POINTER(handle),),
        "AddData": (handle, c_int, c_char_p, c_size_t, c_char_p),
        "Complete": (handle,),
        "GetLinkedCubinSize": (handle, size_p),
        "GetLinkedCubin": (handle, c_char_p),
        "GetInfoLogSize": (handle, size_p),
        "GetInfoLog": (handle, c_char_p),
        "GetErrorLogSize": (handle, size_p),
        "GetErrorLog": (handle, c_char_p),
        "Version": (POINTER(c_uint), POINTER(c_uint)),
    }
    for name, argtypes in signatures.items():
        function = getattr(lib, f"nvJitLink{name}")
        function.argtypes, function.restype = argtypes, c_int
    return lib


def version() -> tuple[int, int]:
    """(major, minor) of the CUDA toolkit that this nvJitLink belongs to, as the library itself says."""
    major, minor = c_uint(), c_uint()
    library().nvJitLinkVersion(byref(major), byref(minor))
    return major.value, minor.value


def options(arch: str) -> tuple[str, ...]:
    """The linker's options for one architecture; part of the fingerprint."""
    return (f"-arch={arch}", "-verbose")


def assemble(ptx: str, arch: str) -> Assembled:
    """Assemble one PTX text for `arch` ('sm_120'). AssembleError with nvJitLink's own log if it refuses."""
    if arch not in ARCHS:  # nvJitLink 12.9 corrupts its heap over an architecture that it does not know
        raise AssembleError(f"arch {arch!r:.50} is none of {', '.join(ARCHS)}")
    lib = library()
    given = [option.encode() for option in options(arch)]
    handle = c_void_p()
    status = lib.nvJitLinkCreate(byref(handle), len(given), (c_char_p * len(given))(*given))
    if status:
        raise AssembleError(f"nvJitLink refuses the options {' '.join(options(arch))}: {_name(status)}")
    try:
        data = ptx.encode()
        # The size counts the terminating zero, which a ctypes char pointer always has.
        status = lib.nvJitLinkAddData(handle, INPUT_PTX, data, len(data) + 1, b"kernel.ptx")
        status = status or lib.nvJitLinkComplete(handle)
        if status:
            raise AssembleError(
                f"nvJitLink cannot assemble for {arch}: {_name(status)}: {_log(handle, 'Error').strip()}"
            )
        return Assembled(_read(handle, "LinkedCubin"), _log(handle, "Info"))
    finally:
        lib.nvJitLinkDestroy(byref(handle))


def _read(handle: c_void_p, what: str) -> bytes:
    """The bytes of nvJitLinkGet<what>, sized by nvJitLinkGet<what>Size."""
    lib, size = library(), c_size_t()
    status = getattr(lib, f"nvJitLinkGet{what}Size")(handle, byref(size))
    buffer = ctypes.create_string_buffer(max(size.value, 1))
    status = status or getattr(lib, f"nvJitLinkGet{what}")(handle, buffer)
    if status:
        raise AssembleError(f"nvJitLinkGet{what}: {_name(status)}")
    return buffer.raw[: size.value]


def _log(handle: c_void_p, kind: str) -> str:
    return _read(handle, f"{kind}Log").rstrip(b"\0").decode(errors="replace")


def _name(status: int) -> str:
    return RESULTS[status] if status < len(RESULTS) else f"status {status}"
