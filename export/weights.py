"""Where the parameters of VGG-19 come from: `embedded`, `imagenet`, a file, or `auto`.

Nothing is fetched from a network unless the caller names `imagenet`.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import vgg
from .commands import nearest
from .embedded import load_embedded

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)
_LOGGER = logging.getLogger("engine")  # who wants no progress gives it a level

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)  # RGB; the caffe networks take BGR in 0-255 minus this
CAFFE_STD = (1 / 255, 1 / 255, 1 / 255)
# Published with torchvision's VGG19_Weights.IMAGENET1K_V1, whose file name carries the first eight digits.
IMAGENET_SHA256 = "dcbb9e9dad569fff7a846263a77324fc34978fea2bfb039c012d710e1776ae44"
# neural-style-pt's conversion of the caffe network; what its script saves has this name too, but other bytes.
_CAFFE_AS_TORCHVISION = "d01eb7cb"
_ATTEMPTS = 3
_SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class Weights:
    """Parameters of the convolutions in use, for an image that is RGB in [0, 1].

    `parameters` holds float32 `conv1_1.weight` (C_out, C_in, 3, 3), `conv1_1.bias` (C_out,) and so on; `mean` and
    `std` (3,) normalise the image before conv1_1.
    """

    name: str
    parameters: Mapping[str, Tensor]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """sha256 over the normalisation and the first one, two, .. convolutions: how many there are does not matter."""
        state = hashlib.sha256(repr((self.mean, self.std)).encode())
        digests = []
        for conv in vgg.CONVS:
            for key in (f"{conv.name}.weight", f"{conv.name}.bias"):
                if key in self.parameters:
                    state.update(key.encode())
                    state.update(self.parameters[key].numpy().tobytes())
            digests.append(state.hexdigest())
        return tuple(digests)

    @property
    def kind(self) -> str:
        """`embedded`, or the network that a file was trained for: `imagenet`, or `caffe` with its own preprocessing."""
        return self.name if self.name == "embedded" else "caffe" if self.mean == CAFFE_MEAN else "imagenet"

    @property
    def digest(self) -> str:
        """sha256 over normalisation and parameters: the identity of the network in cache keys."""
        return self.digests[-1]

    def kernel(self, conv: vgg.Conv) -> NDArray[np.float32]:
        """The kernel (C_out, C_in, 3, 3) of a convolution; the division by `std` is folded into conv1_1's."""
        kernel: NDArray[np.float32] = self.parameters[f"{conv.name}.weight"].numpy()
        return kernel / np.array(self.std, np.float32).reshape(1, 3, 1, 1) if conv.in_channels == 3 else kernel

    def module(
        self, layers: tuple[str, ...], pooling: str, dtype: torch.dtype = torch.float32, padding: str = "zero"
    ) -> Any:
        """The torch module with these weights in `dtype`; see `vgg.module`."""
        parameters = {key: value.to(dtype) for key, value in self.parameters.items()}
        mean, std = torch.tensor(self.mean, dtype=torch.float64), torch.tensor(self.std, dtype=torch.float64)
        return vgg.module(parameters, mean.to(dtype), std.to(dtype), layers, pooling, padding)


def cache_folder() -> Path:
    """`$STYLIZE_HOME`, else the user's cache folder; not created here."""
    home = os.environ.get("STYLIZE_HOME")
    if home:
        return Path(home)
    from platformdirs import user_cache_path

    return user_cache_path("gatys-engine", appauthor=False)


def load(source: str | Path = "auto", layers: tuple[str, ...] = vgg.LAYERS) -> Weights:
    """The weights of the convolutions up to the deepest of `layers`.

    `source` is `embedded` (ships with the package), `imagenet` (torchvision's checkpoint, downloaded once), `auto`
    (`imagenet` if it is in the cache, else `embedded`) or a `.pth` or `.safetensors` file whose names are either
    torchvision's (`features.0.weight`: RGB, ImageNet mean and deviation) or caffe's (`conv1_1.weight`: BGR, 0-255). The
    published `vgg19-d01eb7cb.pth`, told by that number in its name, has torchvision's names and caffe's network.

    Raises ValueError for an unknown source or a file that holds no VGG-19, OSError if it cannot be read or fetched.
    """
    convs = vgg.cut(layers)
    cached = cache_folder() / f"vgg19-imagenet-{IMAGENET_SHA256[:16]}.safetensors"
    if source == "auto":
        if _is_there(cached):
            return _from_file(cached, convs, "imagenet")
        log.info("weights: embedded; ImageNet features paint better, `--weights imagenet` downloads them once (575 MB)")
        source = "embedded"
    if source == "embedded":
        return Weights("embedded", load_embedded(convs), IMAGENET_MEAN, IMAGENET_STD)
    if source == "imagenet":
        if not _is_there(cached):
            _fetch_imagenet(cached)
        return _from_file(cached, convs, "imagenet")
    path = Path(source)
    if path.suffix not in _SUFFIXES:
        hint, files = nearest(source, ("auto", "embedded", "imagenet")), ", ".join(_SUFFIXES)
        raise ValueError(f"weights {str(source)!r}: {hint}choose auto, embedded, imagenet or a {files} file")
    return _from_file(path, convs, path.name)


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except PermissionError:  # of a folder above it
        return False


def _from_file(path: Path, convs: tuple[vgg.Conv, ...], name: str) -> Weights:
    """Read a state dict in either naming, check it, and bring it to RGB in [0, 1]."""
    with _StateFile(path) as state:
        named = "conv1_1.weight" in state
        if not named and "features.0.weight" not in state:
            raise ValueError(f"{path}: holds neither features.0.weight (torchvision) nor conv1_1.weight (caffe)")
        parameters: dict[str, Tensor] = {}
        for conv, key in zip(convs, _torchvision_names(), strict=False):
            for part, shape in (
                ("weight", (conv.out_channels, conv.in_channels, 3, 3)),
                ("bias", (conv.out_channels,)),
            ):
                stored = f"{conv.name if named else key}.{part}"
                if stored not in state:
                    raise ValueError(f"{path}: {stored} is missing")
                value = state[stored]
                if tuple(value.shape) != shape:
                    raise ValueError(f"{path}: {stored} has shape {tuple(value.shape)}, VGG-19 needs {shape}")
                value = value.float()
                if not bool(torch.isfinite(value).all()):
                    raise ValueError(f"{path}: {stored} holds NaN or infinity")
                parameters[f"{conv.name}.{part}"] = value.contiguous()
    if named or _CAFFE_AS_TORCHVISION in path.name:
        parameters["conv1_1.weight"] = parameters["conv1_1.weight"].flip(1).contiguous()  # BGR -> RGB
        return Weights(name, parameters, CAFFE_MEAN, CAFFE_STD)
    return Weights(name, parameters, IMAGENET_MEAN, IMAGENET_STD)


class _StateFile:
    """A state dict, loaded without running code from the file; safetensors tensors are read one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._tensors: Mapping[str, Tensor] = {}

    def __enter__(self) -> _StateFile:
        if not self.path.is_file():
            raise FileNotFoundError(f"weights file {self.path} does not exist")
        try:
            if self.path.suffix == ".safetensors":
                from safetensors import safe_open

                self._file = safe_open(self.path, framework="pt")
            else:
                self._tensors = torch.load(self.path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # pickle, zip and safetensors have a dozen exception types of their own
            raise ValueError(f"{self.path}: not a state dict that can be loaded safely ({error})") from error
        if self._file is None and not isinstance(self._tensors, Mapping):
            raise ValueError(f"{self.path}: holds a {type(self._tensors).__name__}, not a state dict")
        return self

    def __exit__(self, *exc: object) -> None:
        self._file, self._tensors = None, {}

    def __contains__(self, key: str) -> bool:
        return key in (self._file.keys() if self._file is not None else self._tensors)

    def __getitem__(self, key: str) -> Tensor:
        value = self._file.get_tensor(key) if self._file is not None else self._tensors[key]
        if not isinstance(value, Tensor):
            raise ValueError(f"{self.path}: {key} is a {type(value).__name__}, not a tensor")
        if value.layout != torch.strided or value.is_meta or not value.is_floating_point():
            raise ValueError(f"{self.path}: {key} holds no floats ({value.dtype}, {value.layout}, {value.device})")
        return value.detach()


def _torchvision_names() -> Iterator[str]:
    """`features.0`, `features.2`, `features.5`, ...: a convolution and a ReLU each, a pooling between blocks."""
    index = 0
    for conv in vgg.CONVS:
        index += conv.after_pool
        yield f"features.{index}"
        index += 2


def _imagenet_url() -> str:
    from torchvision.models import VGG19_Weights

    return str(VGG19_Weights.IMAGENET1K_V1.url)


def _fetch_imagenet(target: Path) -> None:
    """Download the checkpoint, verify it, keep its convolutions at `target`: 80 MB that load without the other 470.

    A lock file lets a second process wait for the first. A cut connection starts afresh, three times.
    """
    import pooch
    import requests
    from filelock import FileLock
    from safetensors.torch import save

    url, folder = _imagenet_url(), target.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if target.is_file():  # another process was faster
                return
            pooch.get_logger().setLevel("WARNING")  # it brings a handler of its own; the progress bar says enough
            source = pooch.create(
                folder,
                base_url="",
                registry={"vgg19.pth": f"sha256:{IMAGENET_SHA256}"},
                urls={"vgg19.pth": url},
                retry_if_failed=_ATTEMPTS - 1,
            )
            downloader = pooch.HTTPDownloader(progressbar=_LOGGER.level <= logging.INFO, timeout=30)
            checkpoint, partial = Path(source.fetch("vgg19.pth", downloader=downloader)), target.with_suffix(".partial")
            try:
                with _StateFile(checkpoint) as state:
                    names = [f"{key}.{part}" for key in _torchvision_names() for part in ("weight", "bias")]
                    kept = {name: state[name].contiguous() for name in names}
                with partial.open("wb") as file:
                    file.write(save(kept, {"source": url, "source_sha256": IMAGENET_SHA256}))
                    file.flush()
                    os.fsync(file.fileno())  # before it has its name, or a power failure leaves half of it
                partial.replace(target)
            finally:
                for each in (checkpoint, partial):
                    each.unlink(missing_ok=True)
    except requests.RequestException as error:
        raise OSError(f"could not download {url} ({error}); try again, or pass a file with --weights PATH") from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise PermissionError(
            f"cannot write the weights to {folder} ({error.strerror}); set STYLIZE_HOME to a folder that can be written"
        ) from error
    except ValueError as error:
        if "hash" not in str(error):
            raise
        raise OSError(f"what {url} sent is not the published checkpoint (sha256 differs); it was deleted") from error
