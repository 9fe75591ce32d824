"""The motion between two frames of a video, and a picture carried along by it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import kernels
from .export.commands import install_line
from .image import Picture, to_tensor

_ALIKE = 0.2  # in a colour, of what is taken for the same thing in two frames
_Flow = NDArray[np.float32]


@dataclass(frozen=True)
class Carried:
    """What a frame begins with, and what holds it: the picture of the frame before, brought to where things are now.

    `certain`, float32 (H, W), is 1 where the motion is known and 0 elsewhere; `weight` is that of the temporal loss.
    """

    picture: Picture
    certain: NDArray[np.float32]
    weight: float

    def loss(self, device: torch.device) -> kernels.Temporal:
        """The temporal loss of the frame."""
        certain = torch.from_numpy(self.certain)[None, None]
        return kernels.Temporal(to_tensor(self.picture).to(device), certain.to(device), self.weight)

    @property
    def digest(self) -> str:
        """sha256 of all of it."""
        state = hashlib.sha256(f"{self.picture.digest} {self.weight!r}".encode())
        state.update(np.ascontiguousarray(self.certain).data)
        return state.hexdigest()


def carry(picture: Picture, before: Picture, now: Picture, weight: float) -> Carried:
    """The `picture` of the frame `before` carried to the frame `now`; all are of one size.

    Optical flow is that of Kroeger et al. 2016 (DIS, OpenCV's). It is certain where the flows there and back agree,
    within the picture, off the edges of what moves (Ruder, Dosovitskiy, Brox 2016, eq. 5 and 6), and where it leads to
    like colours. Elsewhere the picture also gets what is new in the frame, or what comes into sight would have to be
    found in what it replaces.
    Raises RuntimeError without OpenCV, or where that fails.
    """
    cv2 = opencv()
    try:
        return _carry(cv2, picture, before, now, weight)
    except cv2.error as error:
        raise RuntimeError(f"OpenCV: {error}") from error


def _carry(cv2: Any, picture: Picture, before: Picture, now: Picture, weight: float) -> Carried:
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    grey = [cv2.cvtColor(np.rint(255 * each.rgb).astype(np.uint8), cv2.COLOR_RGB2GRAY) for each in (before, now)]
    there, back = method.calc(grey[0], grey[1], None), method.calc(grey[1], grey[0], None)
    rows, columns = np.indices(back.shape[:2], np.float32)
    x, y = columns + back[..., 0], rows + back[..., 1]  # where it was, for each pixel of now

    def at(source: Any, kind: int) -> Any:
        return cv2.remap(source, x, y, kind, borderMode=cv2.BORDER_REFLECT_101)  # streaks would be painted

    height, width = x.shape
    known = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1) & _agree(back, at(there, cv2.INTER_LINEAR))
    moved, old = (at(np.ascontiguousarray(each.rgb), cv2.INTER_CUBIC) for each in (picture, before))
    change = now.rgb - old
    known &= abs(change).max(-1) < _ALIKE
    new = np.where(known[..., None], 0, change)
    return Carried(Picture(np.clip(moved + new, 0, 1)), known.astype(np.float32), weight)


def _agree(back: _Flow, there: _Flow) -> NDArray[np.bool_]:
    """Where a flow (H, W, 2) and the one from its end undo each other, and it is smooth."""
    own, other = (back**2).sum(-1), (there**2).sum(-1)
    slopes = sum((np.gradient(back, axis=axis) ** 2).sum(-1) for axis in (0, 1))
    undone: NDArray[np.bool_] = ((back + there) ** 2).sum(-1) < 0.01 * (own + other) + 0.5
    return undone & (slopes < 0.01 * own + 0.002)


def opencv() -> Any:
    """OpenCV; RuntimeError where it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise RuntimeError(f"the motion in a video needs OpenCV: {install_line('video')}") from error
    return cv2
