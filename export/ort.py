"""Finds ONNX Runtime.

Two wheels, `onnxruntime` and `onnxruntime-gpu`, install the same folder: only one of them may be there.
"""

from __future__ import annotations

from importlib import metadata
from types import ModuleType

INSTALL = "pip install 'gatys-engine[{extra}]'"


class BackendError(RuntimeError):
    """A device, provider or library that was asked for is not what is running."""


def onnxruntime(extra: str = "cpu") -> ModuleType:
    """Import and return onnxruntime.

    Raises BackendError with the exact install line of `extra` (`cpu`, `gpu` or `tensorrt`) if the wheel is missing,
    doubled or broken.
    """
    line = INSTALL.format(extra=extra)
    wheels = [wheel for wheel in ("onnxruntime", "onnxruntime-gpu") if _installed(wheel)]
    if len(wheels) == 2:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; keep one: "
            f"pip uninstall -y onnxruntime onnxruntime-gpu && {line}"
        )
    try:
        import onnxruntime
    except ImportError as error:
        if not wheels:
            raise BackendError(f"ONNX Runtime is not installed: {line}") from error
        raise BackendError(f"{wheels[0]} is installed but does not load ({error}): {line} --force-reinstall") from error
    return onnxruntime


def _installed(wheel: str) -> bool:
    try:
        metadata.distribution(wheel)
    except metadata.PackageNotFoundError:
        return False
    return True
