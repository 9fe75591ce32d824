"""The options of one stylisation. Standard library only, so that `--help` answers at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any

LAYERS = tuple(f"relu{block}_{i}" for block, count in enumerate((2, 2, 4, 4, 4), 1) for i in range(1, count + 1))
MIN_SIDE = 32  # pixels; the fifth block of VGG-19 needs them
WHOLE = 16  # pixels; sides of a picture that tiles are multiples of it, because pooling halves them four times
COARSEST = 128  # pixels; about the long side of the first scale
_MAX_SIZE = 16384


def choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`, else raise ValueError with the nearest one."""
    allowed = list(choices)
    if value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"{name} {value!r} is unknown: {hint}choose from {', '.join(allowed)}")


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of one call; each field is a command line option of the same name. Raises ValueError or TypeError."""

    size: int = _option(512, "long side of the result in pixels")
    iterations: int | tuple[int, ...] = _option(100, "evaluations at the last scale, or N,N,... for each scale")
    scales: int | str = _option(
        "auto", "number of scales, each sqrt(2) larger than the one before; auto starts near 128"
    )
    content_weight: float = _option(1.0, "weight of the content loss")
    style_weight: float = _option(3e3, "weight of the style loss")
    tv_weight: float = _option(0.0, "weight of the total variation loss")
    tv_power: float = _option(2.0, "power of a difference of neighbours in the total variation loss, from 1")
    # The paper takes relu4_2; relu2_2 also holds faces and houses that are a few dozen pixels wide.
    content_layers: tuple[str, ...] = _option(("relu2_2",), "layers of the content loss")
    style_layers: tuple[str, ...] = _option(
        ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"), "layers of the style loss"
    )
    pooling: str = _option("avg", "pooling of the network: avg or max")
    padding: str = _option("zero", "what the first layer sees beyond the border: zero, reflect or replicate")
    tile: bool = _option(False, "wrap around at the borders, so that the result tiles; sides are multiples of 16")
    init: str = _option("content", "start from content, noise, style (its colours, drawn) or a picture (PATH)")
    init_noise: float = _option(0.0, "share of noise in the start, from 0 to 1")
    optimizer: str = _option("lbfgs", "lbfgs or adam")
    learning_rate: float = _option(0.03, "step of adam, in pixel values from 0 to 1")
    history: int = _option(20, "pairs that lbfgs remembers, from 1 to 20")
    clamp: bool = _option(False, "keep the pixels of lbfgs in range at every step, as adam does")
    average: float = _option(0.0, "decay of the running average of the pictures, which is then the result; 0 is off")
    stop: float = _option(0.0, "end a scale when 20 evaluations improve the best loss by a smaller share; 0 is off")
    seed: int = _option(0, "seed of the noise")

    def __post_init__(self) -> None:
        _whole("size", self.size, MIN_SIDE, _MAX_SIZE)
        _whole("seed", self.seed, 0, 2**63 - 1)
        for count in self.iterations if isinstance(self.iterations, tuple) else (self.iterations,):
            _whole("iterations", count, 1, 10**6)
        if self.iterations == ():
            raise ValueError("iterations: give at least one number")
        if self.scales != "auto":
            if isinstance(self.scales, str):
                raise ValueError(f"scales {self.scales!r}: give auto or a number")
            _whole("scales", self.scales, 1, 32)
        for name in ("content_weight", "style_weight", "tv_weight"):
            weight = _float(name, getattr(self, name))
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name} {weight}: give a finite number that is not negative")
        for name in ("content_layers", "style_layers"):
            layers = getattr(self, name)
            if isinstance(layers, str) or not isinstance(layers, tuple | list):
                raise TypeError(f"{name} has to be a tuple of layers, not {layers!r}")
            if not layers:
                raise ValueError(f"{name}: give at least one layer")
            for layer in layers:
                choice(f"{name}: layer", layer, LAYERS)
            if len(set(layers)) < len(layers):
                raise ValueError(f"{name}: {', '.join(layers)} names a layer twice")
            object.__setattr__(self, name, tuple(layers))
        choice("pooling", self.pooling, ("avg", "max"))
        choice("padding", self.padding, ("zero", "reflect", "replicate"))
        choice("optimizer", self.optimizer, ("lbfgs", "adam"))
        _number("init_noise", self.init_noise, 0, 1)
        _number("tv_power", self.tv_power, 1, 16)
        _number("learning_rate", self.learning_rate, 1e-6, 1)
        _number("average", self.average, 0, 0.9999)
        _number("stop", self.stop, 0, 1)
        _whole("history", self.history, 1, 20)
        for name in ("clamp", "tile"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} has to be True or False, not {getattr(self, name)!r}")
        if self.tile and self.padding != "zero":
            raise ValueError(f"padding {self.padding}: a picture that tiles has no border, leave padding or tile out")
        object.__setattr__(self, "init", str(self.init))

    @property
    def layers(self) -> tuple[str, ...]:
        """All loss layers, from the shallowest to the deepest."""
        return tuple(layer for layer in LAYERS if layer in self.content_layers or layer in self.style_layers)

    def whole(self, size: tuple[int, int]) -> tuple[int, int]:
        """A (width, height) that can be optimised: to tile, both are rounded up to multiples of WHOLE."""
        width, height = (-(-side // WHOLE) * WHOLE for side in size) if self.tile else size
        return width, height

    def schedule(self, aspect: float) -> list[tuple[int, int]]:
        """(long side, iterations) of each scale, coarse to fine, for a picture of this aspect (long / short side >= 1).

        Coarse iterations are cheap and settle the large strokes: each scale gets sqrt(2) times the iterations of the
        next finer one. Scales whose short side would fall under MIN_SIDE are left out.
        """
        auto = 1 + max(0, round(2 * math.log2(self.size / COARSEST)))
        count = auto if self.scales == "auto" else int(self.scales)
        sides = [round(self.size / math.sqrt(2) ** i) for i in reversed(range(count))]
        sides = [max(self.whole((side, side))) for side in sides if round(side / aspect) >= MIN_SIDE]
        if not sides:
            raise ValueError(
                f"a picture {aspect:.1f} times as long as it is wide has a short side under {MIN_SIDE} pixels "
                f"at size {self.size}: choose a larger size or crop it"
            )
        if isinstance(self.iterations, tuple):
            if len(self.iterations) == 1:
                return [(side, self.iterations[0]) for side in sides]
            if len(self.iterations) != len(sides):
                raise ValueError(f"iterations names {len(self.iterations)} scales, there are {len(sides)}: {sides}")
            return list(zip(sides, self.iterations, strict=True))
        last = len(sides) - 1
        return [(side, round(self.iterations * math.sqrt(2) ** (last - i))) for i, side in enumerate(sides)]


def options() -> Iterable[Field[Any]]:
    """The fields of `Config`, for building a command line."""
    return fields(Config)


def _whole(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} has to be a whole number, not {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} {value}: give a number from {low} to {high}")


def _float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} has to be a number, not {value!r}")
    return value


def _number(name: str, value: object, low: float, high: float) -> None:
    if not low <= _float(name, value) <= high:
        raise ValueError(f"{name} {value}: give a number from {low:g} to {high:g}")
