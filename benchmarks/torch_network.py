"""Our loop with torch's convolutions in the place of a runtime: shows losses, optimiser and stream where torch is all
that can run a network on the GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine import image as images
from engine import kernels
from engine.export import vgg
from engine.losses import Objective, Region
from engine.targets import Statistic

from . import cases

NAME = "our loop on torch"
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Features:
    """VGG-19 by torch and autograd, as an `engine.features.Features`; in NHWC order."""

    def __init__(self, spec: vgg.Spec, module: torch.nn.Module, device: str) -> None:
        self.spec, self.products = spec, None
        dtype = _DTYPES[spec.precision]
        self._module = module.to(device, dtype, memory_format=torch.channels_last)
        self._lock = threading.RLock()
        self.image = torch.zeros(1, 3, spec.height, spec.width, device=device)
        self.gradient = torch.zeros_like(self.image)
        self.features, self.cotangents = (
            {
                name: torch.zeros(spec.shapes[name], dtype=dtype, device=device).contiguous(
                    memory_format=torch.channels_last
                )
                for name in spec.layers
            }
            for _ in range(2)
        )

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """Own the memory, on whatever stream is the current one."""
        with self._lock:
            yield

    def forward(self) -> None:
        """image -> features."""
        with torch.enable_grad():
            self._leaf = self.image.detach().requires_grad_()
            low = self._leaf.to(_DTYPES[self.spec.precision], memory_format=torch.channels_last)
            self._outputs: dict[str, Tensor] = self._module(low)
        for name, output in self._outputs.items():
            self.features[name].copy_(output.detach())

    def vjp(self, write: Callable[[tuple[str, ...]], None]) -> None:
        """cotangents -> gradient."""
        write(self.spec.layers)
        outputs = [self._outputs[name] for name in self.cotangents]
        self.gradient.copy_(torch.autograd.grad(outputs, self._leaf, list(self.cotangents.values()))[0])


class Engine(cases.Engine):
    """The problem's loop on it, on the device of the rivals."""

    def __init__(self, problem: cases.Problem, precision: str) -> None:
        config, (width, height) = problem.config, problem.size
        weights = cases.weights(problem)

        def open_at(height: int, width: int) -> Features:
            module = weights.module(config.layers, config.pooling, torch.float32)
            return Features(vgg.Spec(height, width, config.layers, config.pooling, precision), module, problem.device)

        style = images.to_tensor(images.resize(problem.style, problem.style.fit(config.size)))
        of_style = open_at(*style.shape[2:])
        of_style.image.copy_(style)
        of_style.forward()
        features = {name: of_style.features[name].flatten(2)[0] for name in config.style_layer_weights}
        grams = {name: Statistic(kernels.gram(each), each.mean(1)) for name, each in features.items()}
        network = open_at(height, width)
        network.image.copy_(problem.start)
        network.forward()
        targets = {name: network.features[name].clone() for name in config.content_layer_weights}
        self._objective = Objective(network, targets, [Region(grams)], config)
        self._device = network.image.device
