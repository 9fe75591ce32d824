"""What a run hands out: its steps, its end, and the score of a picture."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import colour
from . import image as images
from .checkpoint import Checkpoint, dump, write
from .config import Config
from .optimize import Iterate, Stall
from .regions import Mask, restored

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """State of a run after one iteration.

    `scale` is the long side in pixels; `iteration` counts from 1 over the whole run, `total` is the last one as far as
    is known: a scale that stops early makes it smaller. `precision` is that of the network, which may fall back once in
    a run. `loss`, that of this iteration, and `picture` and `image`, the best picture of this scale so far (the average
    of its pictures with `Config.average`), are converted when they are asked for, by the thread that takes the steps: a
    GPU works ahead, and asking waits for it.
    """

    scale: int
    iteration: int
    total: int
    precision: str
    _iterate: Iterate = field(repr=False)
    _content: images.Picture = field(repr=False)
    _config: Config = field(repr=False)
    _freeze: Mask | None = field(repr=False)
    _checkpoint: Callable[[], Checkpoint] = field(repr=False)
    _describe: Callable[..., dict[str, Any]] = field(repr=False)

    @property
    def loss(self) -> float:
        """The weighted total loss of this iteration's picture."""
        return self._iterate.loss

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of this iteration by stage: forward, losses, cotangents, vjp, optimiser; empty on a GPU."""
        return self._iterate.stages

    @property
    def picture(self) -> images.Picture:
        """The best (or the average) picture of this scale so far in float32, with the content's alpha if it has one."""
        alpha, pixels = self._content.alpha, self._iterate.best
        own = self._config
        if alpha is not None:
            height, width = pixels.shape[2:]
            alpha = images.resize_plane(alpha, (width, height), own.tile)
        shown = colour.finish(own.colour, images.from_tensor(pixels), self._content, own.tile)
        if self._freeze is not None:
            shown = restored(shown, self._content, self._freeze, own.tile)
        return replace(shown, alpha=alpha, name=None)

    @property
    def pixels(self) -> Tensor:
        """What is optimised (1, 3, H, W), without what the content gives back in the end; later steps write over it."""
        return self._iterate.best

    @property
    def image(self) -> Image.Image:
        """The `picture` in 8 bits, RGB or (if the content has alpha) RGBA."""
        return images.to_pil(self.picture)

    def manifest(self, losses: Sequence[tuple[int, float]], seconds: float) -> dict[str, Any]:
        """What the picture so far was made of, as JSON: see `engine.manifest`.

        `losses` are the (iteration, loss) of the run up to here, of which some are kept, `seconds` what it took.
        """
        return self._describe(losses, seconds, self.precision, self.total)

    def checkpoint(self, note: Any = None) -> bytes:
        """The run so far, for `Stylizer.steps(.., resume=..)`: 1.2 kB a pixel with L-BFGS (GPU: 0.3), else 48 bytes.

        To be called before the next step is asked for, or after the iterator was closed at this step; raises
        RuntimeError later, when the optimiser has moved on. On a GPU it waits for the iterations under way. `note`, of
        JSON, is kept with it: see `engine.checkpoint.note`.
        """
        return dump(replace(self._checkpoint(), note=note))

    def save_checkpoint(self, path: Path, note: Any = None, room: int | None = None) -> None:
        """Write the `checkpoint` to a file, without a copy in memory.

        Raises OSError, also for more than `room` bytes, and RuntimeError as that does.
        """
        write(replace(self._checkpoint(), note=note), path, room)


@dataclass(frozen=True)
class Result:
    """A finished run.

    `image` is the picture in 8 bits (`last.picture` has it in float32), `last` the last step, `trace` holds scale, loss
    and seconds since the start of each iteration. The last step holds the pictures of the call, in float32, for the
    picture and the manifest: keep the image alone where there are many.
    """

    image: Image.Image
    last: Step
    trace: tuple[tuple[int, float, float], ...]

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """What the picture was made of: see `engine.manifest`. Raises OSError or ValueError if the weights are gone."""
        losses = [(iteration, loss) for iteration, (_, loss, _) in enumerate(self.trace, 1)]
        return self.last.manifest(losses, self.trace[-1][2])

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the picture with its manifest, as `python -m engine.stylize` does: see `engine.image.save`.

        Raises ValueError for a suffix or a size that no format has, or a file that is there (unless `overwrite`),
        OSError where none can be written.
        """
        images.check_output(str(path), overwrite)
        images.check_size(str(path), self.image.size)
        images.save(self.last.picture, str(path), self.manifest)


@dataclass(frozen=True)
class Score:
    """Losses of a picture and the gradient of the total.

    `loss` is the weighted total; `content_loss` is the sum over its layers by their weights, `style_loss` (by layer)
    and `tv_loss` are unweighted; `gradient` is float32 (H, W, 3): d loss / d pixel, for pixels in [0, 1].
    """

    loss: float
    content_loss: float
    style_loss: dict[str, float]
    tv_loss: float
    gradient: NDArray[np.float32]


def checkpoint_of(
    identity: Callable[[], dict[str, Any]],
    precision: str,
    scale: int,
    iteration: int,
    iterate: Iterate,
    counts: list[int],
    stall: Stall,
) -> Checkpoint:
    """The run behind `iterate`, the newest of it, with the iterations of its scales and what it knows of a stall."""
    tensors = iterate.save() | {"schedule": torch.tensor(counts), "stall": stall.save()}
    return Checkpoint(identity() | {"precision": precision}, scale, iteration, tensors)
