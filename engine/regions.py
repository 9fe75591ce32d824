"""What a style statistic sees of a layer: its features, shifted or less a mean, and one region of the picture.

Every statistic is the second moment of X = (F - s 1^T) diag(g) over the M positions: G = X X^T / M, with the mean
m = F g^2 / M. The shift s is zero for Gram matrices and one for shifted ones; for covariances it is near m, and what is
left of m is taken off G: G - (m - s) (m - s)^T. So s is known before m, and all features need not be there at once. As
X is rounded to 16 bits, m - s is taken of what it has become, X g / M: else G - (m - s) (m - s)^T is no covariance. The
guide g of a region is its mask at the layer with mean(g^2) = 1 (Gatys et al. 2017, section 4), and one without masks.
If dL/dX = D X, then dL/dF = (D X + b g^T) diag(g), where b belongs to the mean: the kernels of Gram matrices serve all
of them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from . import image as images
from . import kernels
from .features import Features, Part, pass_over
from .targets import Statistic, Statistics

log = logging.getLogger(__name__)

Mask = NDArray[np.float32]  # (H, W) in [0, 1]
_FADE = 2  # pixels
_FROZEN = 0.5  # a pixel is frozen whose part in the mask is not smaller


class View:
    """X of features F (C, M) and dL/dX to be filled in, to be added to `target`, the cotangent of F.

    All are in the layout and dtype of F. X and dL/dX have memory of their own, or as much as they need of `room`, two
    flat tensors that others use at other times; without target there is no dL/dX. `shift` is s, a number or (C,) fp32;
    `guide` (M,) fp32, None for the whole picture.
    """

    def __init__(
        self,
        features: Tensor,
        shift: Tensor | float,
        guide: Tensor | None,
        target: Tensor | None = None,
        room: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._source, self._target = features, target
        self._shift = shift[:, None].to(features.device) if isinstance(shift, Tensor) else shift
        self._guide = None if guide is None else guide.to(features.device)
        self.features = torch.empty_like(features) if room is None else alike(features, room[0])
        self.cotangent: Tensor | None = None
        if target is not None:
            self.cotangent = torch.empty_like(features) if room is None else alike(features, room[1])

    def read(self) -> None:
        """F -> X."""
        found, guide = self.features, self._guide
        if guide is None:
            torch.sub(self._source, self._shift, out=found)
        else:
            torch.mul(self._source - self._shift, guide, out=found)

    def away(self) -> Tensor:
        """m - s (C,) fp64 of the X that was read."""
        return kernels.exact_mean(self.features, self._guide)

    def write(self, slope: Tensor | None) -> None:
        """Add dL/dF to the cotangent of F, from dL/dX and b = `slope` (C,) fp32 (None is zero)."""
        assert self._target is not None
        assert self.cotangent is not None
        found = self.cotangent
        if self._guide is None:
            self._target += found if slope is None else found + slope[:, None]
        else:
            found = found if slope is None else found + slope[:, None] * self._guide
            self._target += found * self._guide


def alike(tensor: Tensor, memory: Tensor) -> Tensor:
    """A tensor (C, M) in the layout of another one, at the beginning of `memory`."""
    rows, columns = tensor.shape
    flat = memory[: tensor.numel()]
    return flat.view(columns, rows).T if tensor.stride(0) == 1 else flat.view(rows, columns)


class Moments:
    """The `statistic` of a style, gram, shifted or wasserstein, whose features come in pieces of `positions` in all."""

    def __init__(self, statistic: str, positions: int, products: kernels.Products | None) -> None:
        self._statistic, self._positions, self._products = statistic, positions, products
        self._shift: Tensor | float = 1.0 if statistic == "shifted" else 0.0
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, features: Tensor, guide: Tensor | None) -> None:
        """Take features (C, m) in; with a guide, its part (m,) at them."""
        if self._sums is None and self._statistic == "wasserstein":
            self._shift = features.mean(1, dtype=torch.float32)
        if self._statistic == "gram" and guide is None:
            seen, away = features, kernels.exact_mean(features)
        else:
            view = View(features, self._shift, guide)
            view.read()
            seen, away = view.features, view.away()
        gram = kernels.exact_gram(seen) if self._statistic == "wasserstein" else kernels.gram(seen, self._products)
        share = features.shape[1] / self._positions
        own = share * gram, share * away
        self._sums = own if self._sums is None else (self._sums[0] + own[0], self._sums[1] + own[1])

    @property
    def statistic(self) -> Statistic:
        """What all of them have."""
        assert self._sums is not None
        matrix, away = self._sums
        if self._statistic == "wasserstein":
            matrix = matrix - torch.outer(away, away)
        return Statistic(matrix, (self._shift + away).float())


def statistics_of(
    network: Features, picture: images.Picture, layers: Sequence[str], statistic: str, mask: Mask | None
) -> Statistics:
    """The `statistic` of each of the layers for a picture, in the size of the network, or for its part in a mask.

    Raises FloatingPointError if one is not finite.
    """
    shapes = {layer: network.spec.shapes[layer][2:] for layer in layers}
    moments = {layer: Moments(statistic, math.prod(shape), network.products) for layer, shape in shapes.items()}
    guides = {} if mask is None else {layer: guide(mask, shape) for layer, shape in shapes.items()}

    def add(names: tuple[str, ...]) -> None:
        part = network.parts[network.turn]
        for name in (each for each in names if each in moments):
            own = None if mask is None else guide_of(part, name, guides[name], shapes[name])
            moments[name].add(part.features[name].flatten(2)[0], own)

    with network.use():
        network.image.copy_(images.to_tensor(picture))
        pass_over(network, add)
        found = {layer: each.statistic for layer, each in moments.items()}
        finite = [bool(torch.isfinite(each.matrix).all()) for each in found.values()]
    if not all(finite):
        raise FloatingPointError("the features of a style, or their products, are not finite")
    return found


def guide_of(part: Part, layer: str, guide: Tensor, size: tuple[int, int]) -> Tensor:
    """What a part of a network sees of the guide of a layer of (height, width)."""
    return guide if part.areas is None else guide.view(size)[part.areas[layer]].flatten()


def guide(mask: Mask, size: tuple[int, int]) -> Tensor:
    """The guide (M,) fp32 of a mask for features of (height, width): its mean over each position's area, normalised."""
    shrunk = functional.adaptive_avg_pool2d(torch.from_numpy(mask)[None, None].double(), size).flatten()
    return (shrunk / shrunk.square().mean().sqrt()).float()


def frozen(mask: Mask, size: tuple[int, int]) -> Tensor:
    """Which pixels (1, 1, height, width) of a picture of (width, height) are frozen, as bools."""
    return fitted(mask, size) >= _FROZEN


def restored(picture: images.Picture, content: images.Picture, mask: Mask, wrap: bool = False) -> images.Picture:
    """The picture with the frozen pixels of the content, which fade into it over the next _FADE pixels, around its
    borders if `wrap`.

    Pixels beside frozen ones see features that they cannot change, and get loud for that.
    """
    reach = total = frozen(mask, picture.size).float()
    for _ in range(_FADE):
        framed = functional.pad(reach, (1, 1, 1, 1), "circular" if wrap else "constant")
        reach = functional.max_pool2d(framed, 3, 1)
        total = total + reach
    share: NDArray[np.float32] = (total / (1 + _FADE))[0, 0, :, :, None].numpy()
    own = images.resize(content, picture.size, wrap)
    return images.Picture((share * own.rgb + (1 - share) * picture.rgb).astype(np.float32))


def load_freeze(source: Any, picture: images.Picture, size: tuple[int, int]) -> Mask:
    """A mask of the pixels of `picture` that stay, in a result of (width, height); raises as `load_mask` does.

    Also raises ValueError if there are none.
    """
    mask = load_mask(source, picture, "freeze mask")
    if not frozen(mask, size).any():
        raise ValueError(f"freeze mask covers less than half of every pixel at {size[0]} x {size[1]}: none would stay")
    return mask


def fitted(mask: Mask, size: tuple[int, int]) -> Tensor:
    """The mask (1, 1, height, width) at a size of (width, height): its mean over the area of each pixel."""
    return functional.adaptive_avg_pool2d(torch.from_numpy(mask)[None, None], (size[1], size[0]))


def load_mask(source: Any, picture: images.Picture, name: str) -> Mask:
    """A mask for `picture`: grey picture, white is inside; the word `alpha` is the picture's alpha.

    Raises ValueError if it is empty, has not the picture's shape, or there is no alpha.
    """
    if isinstance(source, str) and source == "alpha":
        if picture.alpha is None:
            raise ValueError(f"{name} alpha: the picture has no alpha channel")
        plane = picture.alpha
    else:
        found = images.load(source)
        plane = found.rgb.mean(axis=2, dtype=np.float32)
        if found.alpha is not None:
            plane = plane * found.alpha
        own, wanted = found.size[0] / found.size[1], picture.size[0] / picture.size[1]
        if abs(own / wanted - 1) > 0.02:
            raise ValueError(
                f"{name} has {found.size[0]} x {found.size[1]} pixels, its picture {picture.size[0]} x "
                f"{picture.size[1]}: the shapes have to agree"
            )
    plane = np.ascontiguousarray(plane, np.float32)
    if not plane.max() > 0:
        raise ValueError(f"{name} is empty: all of it is black")
    return plane


def report_coverage(masks: Sequence[Mask]) -> None:
    """Log how much of the content each region covers, and how much of it none or several do."""
    size = max(mask.shape for mask in masks)
    planes = [functional.adaptive_avg_pool2d(torch.from_numpy(mask)[None, None], size) for mask in masks]
    total = torch.cat(planes).sum(0)
    parts = ", ".join(f"{i} covers {100 * float(plane.mean()):.1f}%" for i, plane in enumerate(planes, 1))
    gap, overlap = (float(part.clamp_min(0).mean()) for part in (1 - total, total - 1))
    trouble = [f"{100 * gap:.1f}% belongs to no style"] * (gap > 1e-3)
    trouble += [f"{100 * overlap:.1f}% to more than one"] * (overlap > 1e-3)
    log.info("masks: style %s%s", parts, "; " + ", ".join(trouble) if trouble else "")
