"""Finds ONNX Runtime.

Two wheels, `onnxruntime` and `onnxruntime-gpu`, install the same folder: only one of them may be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

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


def options(arrays: Mapping[str, NDArray[Any]]) -> Any:
    """Quiet SessionOptions with the external initializers of a graph given by value, so that it never reads a file."""
    from onnx import helper  # here: whoever asks for the runtime only need not wait for it

    ort = onnxruntime()
    found = ort.SessionOptions()
    found.log_severity_level = 3
    values = [
        ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, helper.np_dtype_to_tensor_dtype(array.dtype))
        for array in arrays.values()
    ]
    found.add_external_initializers(list(arrays), values)
    return found


def _installed(wheel: str) -> bool:
    try:
        metadata.distribution(wheel)
    except metadata.PackageNotFoundError:
        return False
    return True
