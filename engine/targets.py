"""Style targets: the statistics of a style picture that the style loss compares with, and their file."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .export import vgg
from .image import atomic

_FORMAT = "style targets 4"
_DTYPES = {"wasserstein": torch.float64}  # of the matrices, where they are not fp32


@dataclass(frozen=True)
class Statistic:
    """One layer of a style: `matrix` (C, C), its second moment as in `regions`, and `mean` (C,) fp32.

    The matrix is fp32, a covariance fp64, see `kernels.wasserstein`.
    """

    matrix: Tensor
    mean: Tensor


Statistics = Mapping[str, Statistic]  # by layer


def blend(styles: Sequence[Statistics], shares: Sequence[float], statistic: str) -> Statistics:
    """The statistics of a mixture of styles with these shares, whose sum is one: first and second moments are averaged.

    Covariances gain the spread of the means. The sums are fp64.
    """
    found = {}
    for layer in styles[0]:
        pairs = [(share, style[layer]) for style, share in zip(styles, shares, strict=True)]
        mean = torch.stack([share * each.mean.double() for share, each in pairs]).sum(0)
        matrix = torch.stack([share * each.matrix.double() for share, each in pairs]).sum(0)
        if statistic == "wasserstein":
            for share, each in pairs:
                away = each.mean.double() - mean
                matrix += share * torch.outer(away, away)
        found[layer] = Statistic(matrix.to(styles[0][layer].matrix.dtype), mean.float())
    return found


@dataclass(frozen=True)
class Targets:
    """The statistics of one style at the scales of a run: what a run needs of the picture, which cannot be seen in it.

    `made_for` names what they depend on (weights, pooling, statistic); `sides` has the statistics by the long side of
    the image. Taken wherever a style is.
    """

    made_for: Mapping[str, str]
    sides: Mapping[int, Statistics]

    @property
    def layers(self) -> tuple[str, ...]:
        """The style layers."""
        return tuple(next(iter(self.sides.values()), {}))

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all that the targets hold."""
        state = hashlib.sha256(json.dumps(dict(self.made_for), sort_keys=True).encode())
        for side, layers in sorted(self.sides.items()):  # a file has them in an order of its own
            for layer, each in sorted(layers.items()):
                state.update(f"{side} {layer}".encode())
                for tensor in (_upper(each.matrix), each.mean):
                    state.update(tensor.cpu().contiguous().numpy().tobytes())
        return state.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; of each symmetric matrix, only the upper triangle. Raises OSError."""
        tensors = {}
        for side, layers in self.sides.items():
            for layer, each in layers.items():
                tensors[f"{side}.{layer}.matrix"] = _upper(each.matrix.cpu()).contiguous()
                tensors[f"{side}.{layer}.mean"] = each.mean.cpu().contiguous()
        with atomic(Path(path)) as temporary:
            about = {"format": _FORMAT, "made_for": json.dumps(dict(self.made_for)), "sha256": self.digest}
            temporary.write_bytes(save(tensors, about))

    @staticmethod
    def load(path: str | Path) -> Targets:
        """Read a file of `save`. Raises ValueError if it is none, OSError if it cannot be read."""
        with Path(path).open("rb"):
            pass  # the reader's own errors name no file
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"its format is not {_FORMAT!r}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            made_for = dict(json.loads(metadata["made_for"]))
            found = Targets(made_for, _unpack(tensors, _DTYPES.get(made_for.get("style loss", ""), torch.float32)))
            if found.digest != metadata["sha256"]:
                raise ValueError("its sha256 differs")
            return found
        except (SafetensorError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a file of style targets, or damaged ({error})") from error

    def at(self, side: int, layers: Sequence[str], made_for: Mapping[str, str]) -> Statistics:
        """The statistics at the long side of an image. Raises ValueError if they were made for something else."""
        for name, value in made_for.items():
            if self.made_for.get(name) != value:
                raise ValueError(f"style targets: made for {name} {self.made_for.get(name)}, this run has {value}")
        if side not in self.sides:
            sides = ", ".join(map(str, sorted(self.sides)))
            raise ValueError(f"style targets: made for images of {sides} pixels, this one has {side}")
        found = self.sides[side]
        for layer in layers:
            if layer not in found:
                raise ValueError(f"style targets: made for {', '.join(found)}, not for {layer}")
        return {layer: found[layer] for layer in layers}


def _upper(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns]


def _unpack(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[int, dict[str, Statistic]]:
    """The statistics, whose matrices have this dtype; what a network would not have is refused."""
    sides: dict[int, dict[str, Statistic]] = {}
    for name in tensors:
        side, layer, part = name.split(".")
        if part != "mean":
            continue
        mean, upper = tensors[name], tensors[f"{side}.{layer}.matrix"]
        if mean.shape != (vgg.Spec(vgg.MIN_SIDE, vgg.MIN_SIDE, (layer,)).shapes[layer][1],):
            raise ValueError(f"{layer} has not {tuple(mean.shape)} channels")
        if mean.dtype != torch.float32 or upper.dtype != dtype:
            raise ValueError(f"{layer} has a mean of {mean.dtype} and a matrix of {upper.dtype}")
        matrix = torch.zeros(len(mean), len(mean), dtype=dtype)
        rows, columns = torch.triu_indices(*matrix.shape)
        matrix[rows, columns] = matrix[columns, rows] = upper
        sides.setdefault(int(side), {})[layer] = Statistic(matrix, mean)
    return sides


def is_targets(source: Any) -> bool:
    """Whether a style source is a `Targets` or the name of its file."""
    return isinstance(source, Targets) or (isinstance(source, str | Path) and Path(source).suffix == ".safetensors")
