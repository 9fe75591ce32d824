"""What the steps of an optimiser leave behind: the loss of each, and the best image so far."""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 4  # elements; rows of images begin at multiples of it


class Trail:
    """The losses of `steps` steps, and the best image after each of the last `kept` ones; counted from `first` on.

    `losses` (steps,) fp32 is host memory, into which a GPU writes: a loss is there when its step is done. Optimisers
    count their steps in `made`, (1,) int32 on the device of the image, and need no word from the host.
    """

    def __init__(self, image: Tensor, steps: int = 0, kept: int = 1, first: int = 0) -> None:
        self.losses = torch.empty(steps, pin_memory=image.device.type == "cuda")
        self.made = torch.full((1,), first, dtype=torch.int32, device=image.device)
        width = -(-image.numel() // _AT_ONCE) * _AT_ONCE
        self.images = torch.zeros((kept, width), device=image.device)
        self._shape = image.shape
        self.image(first - 1).copy_(image)

    def image(self, step: int) -> Tensor:
        """The image of the lowest loss up to that step; a view of memory that step + kept writes again."""
        return self.images[step % len(self.images), : self._shape.numel()].view(self._shape)

    @property
    def best(self) -> Tensor:
        """`image` of the newest step, for which this waits."""
        return self.image(int(self.made) - 1)

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """bests (kept, stride), stride, kept, made and losses of a kernel; no losses are a null pointer."""
        kept, stride = self.images.shape
        return self.images, stride, kept, self.made, self.losses if len(self.losses) else None

    def hold(self) -> None:
        """Keep the host memory from others until what is queued on the current stream of a GPU is done.

        torch gives pinned memory that is let go to the next one at once, but for what it knows to be copied.
        """
        if self.images.device.type == "cuda" and len(self.losses):
            self.losses[:1].to(self.images.device, non_blocking=True)

    def leave(self, image: Tensor, loss: float, improved: bool) -> None:
        """Add a step on a CPU: the loss of an image, and whether it is the lowest one."""
        step = int(self.made)
        source = image if improved else self.best
        self.image(step).copy_(source)
        if len(self.losses):
            self.losses[step] = loss
        self.made += 1
