"""Finds ONNX Runtime.

Two wheels, `onnxruntime` and `onnxruntime-gpu`, install the same folder: only one of them may be there.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .commands import install_line

if TYPE_CHECKING:
    from numpy.typing import NDArray


class BackendError(RuntimeError):
    """A device, provider or library that was asked for is not what is running."""


class MissingError(BackendError):
    """What a device needs is not there, or not as it should be."""


def onnxruntime(extra: str = "cpu") -> ModuleType:
    """Import and return onnxruntime.

    Raises MissingError with the exact install line of `extra` (`cpu`, `gpu` or `tensorrt`) if the wheel is missing,
    doubled or broken.
    """
    line = install_line(extra)
    wheels = {wheel: folder for wheel in ("onnxruntime", "onnxruntime-gpu") if (folder := _folder(wheel))}
    if len(wheels) > len({*wheels.values()}):
        raise MissingError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; keep one: "
            f"pip uninstall -y onnxruntime onnxruntime-gpu && {line}"
        )
    try:
        import onnxruntime
    except ImportError as error:
        if not wheels:
            raise MissingError(f"ONNX Runtime is not installed: {line}") from error
        raise MissingError(
            f"{next(iter(wheels))} is installed but does not load ({error}): {line} --force-reinstall"
        ) from error
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


def _folder(wheel: str) -> str | None:
    """Where a wheel has its package, None if it is not installed; of two folders the first on the path counts."""
    try:
        return str(metadata.distribution(wheel).locate_file("onnxruntime"))
    except metadata.PackageNotFoundError:
        return None
