"""Sections of `benchmarks.gpu` for what a user can ask of a run: options, a run that goes on, threads, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine import Config, Stylizer, sheet
from engine import image as images
from engine.kernels.lbfgs import GPU_HISTORY
from engine.motion import Carried
from engine.regions import frozen

from . import cases, controls
from .gpu import Rows
from .styles import engraving, geometric, mosaic

Array = NDArray[np.float32]  # (H, W, 3) in [0, 1], or a mask (H, W)
ENGINES = ("engine-cudnn-fp16", "engine-cuda-fp16", "engine-tensorrt-fp16")
# Relative, against a CPU: of the loss of a picture, of its gradient, of the loss of a run's result. In 40 iterations
# runs part by some percent, as a few ReLUs flip, those with max pooling by up to 15 on a CPU alone, where the content
# differs by 3e-4; what only a run can show changes its end by more than the limit.
LOSS_ERROR = {"fp32": 2e-3, "fp16": 5e-3, "bf16": 2e-2}
GRADIENT_ERROR = {"fp32": 2e-2, "fp16": 5e-2, "bf16": 1e-1}
MAX_GRADIENT_ERROR = {"fp32": 8e-2, "fp16": 2e-1, "bf16": 4e-1}  # routed elsewhere where values agree but for rounding
END_ERROR, OTHER_END_ERROR = {"fp32": 0.02, "fp16": 0.05, "bf16": 0.05}, {"fp32": 0.1, "fp16": 0.2, "bf16": 0.2}
MAX_END_ERROR = {"fp32": 0.15, "fp16": 0.3, "bf16": 0.3}
LEVELS, FEW = 3, 0.01  # by which pixels may differ that should be the same, and the share of those that differ by more
WINDOW = 320  # pixels
_CONVS = {"content_layers": ("conv4_2",), "style_layers": ("conv1_1", "conv3_1", "relu3_1:2")}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "wasserstein": {"style_loss": "wasserstein", "style_weight": 30.0},
    "shifted": {"style_loss": "shifted"},
    "content by sum": {"content_loss": "sum", "content_weight": 1e-3},
    "before ReLUs": _CONVS,
    "max": {"pooling": "max"},
    "zero": {"padding": "zero"},
    "reflect": {"padding": "reflect"},
    "tile": {"tile": True},
    "0-256": {"pixel_range": "0-256"},
    "tv": {"tv_weight": 100.0, "tv_power": 1.25},
    "nine-point tv": {"tv_weight": 100.0, "tv_form": "nine-point"},
    "noise": {"init": "noise", "optimizer": "adam"},
    "adam": {"optimizer": "adam"},
    "average": {"average": 0.9},
    "no clamp": {"clamp": False, "style_weight": 1e6},
    "history 2": {"history": 2, "init": "noise"},
    "grey": {"colour": "keep-before"},
    "blend": {"style_blend": (3.0, 1.0)},
    "masks": {},
    "freeze": {},
}
# What concerns the graphs of a network, or how an iteration is captured: the rest is the same on all engines.
OF_THE_ENGINE = ("default", "wasserstein", "before ReLUs", "max", "zero", "reflect", "tile", "0-256", "masks")
OF_THE_ENGINE += ("average", "history 2", "freeze")
OF_A_RUN = ("default", "noise", "adam", "average", "no clamp", "history 2", "freeze")


@dataclass(frozen=True)
class Found:
    """What an engine made of an option: loss and gradient of the picture of the trial, the result of a run."""

    loss: float
    gradient: Array
    result: Image.Image


class Trial:
    """The pictures with which the options are tried, and what the CPU makes of them."""

    def __init__(self, size: int, iterations: int) -> None:
        problem = self.problem = cases.load(size)
        self._size, self._iterations = size, iterations
        self._content, first = problem.content.rgb, problem.style.rgb
        self._styles = [first, first[::-1, ::-1, ::-1]]
        height, width = self._content.shape[:2]
        self._across = np.repeat(np.linspace(0, 1, width, dtype=np.float32)[None], height, 0)
        start = problem.start[0].permute(1, 2, 0).numpy()
        self._picture = (np.random.default_rng(0).random(start.shape, np.float32) + start) / 2
        self.cpu = Stylizer(problem.weights, "cpu", "fp32")
        self._truths: dict[str, Found] = {}

    def found(self, stylizer: Stylizer, option: str) -> Found:
        """What this stylizer makes of an option."""
        content, styles, config, masks = self._given(option)
        score = stylizer.evaluate(self._picture, content, styles, config, masks=masks)
        freeze = self._across if option == "freeze" else None
        result = stylizer(content, styles, config, masks=masks, freeze=freeze)
        return Found(score.loss, score.gradient, result.image)

    def errors(self, found: Found, option: str) -> dict[str, float]:
        """How far that is from what the CPU makes of it, which scores both results."""
        if option not in self._truths:
            self._truths[option] = self.found(self.cpu, option)
        truth = self._truths[option]
        content, styles, config, masks = self._given(option)
        end, true_end = (
            self.cpu.evaluate(each.result, content, styles, config, masks=masks).loss for each in (found, truth)
        )
        errors = {
            "loss_error": abs(found.loss / truth.loss - 1),
            "gradient_error": float(np.linalg.norm(found.gradient - truth.gradient) / np.linalg.norm(truth.gradient)),
            "end_error": abs(end / true_end - 1),
        }
        if option == "freeze":
            held = frozen(self._across, self.problem.size)[0, 0].numpy()
            start = images.to_pil(images.from_tensor(self.problem.start))
            levels = np.asarray(found.result, int) - np.asarray(start, int)
            errors["frozen_levels"] = float(np.abs(levels[held]).max())
        return errors

    def _given(self, option: str) -> tuple[Array, list[Array], Config, list[Array] | None]:
        """Content, styles, options and masks."""
        shared = {"size": self._size, "iterations": self._iterations, "scales": 1, "history": GPU_HISTORY}
        styles = self._styles[: 2 if option in ("masks", "blend") else 1]
        masks = [self._across, 1 - self._across] if option == "masks" else None
        return self._content, styles, Config(**{**shared, **OPTIONS[option]}), masks


def limits(option: str, precision: str) -> dict[str, float]:
    """The errors that an option may have in a precision."""
    gradient = MAX_GRADIENT_ERROR if option == "max" else GRADIENT_ERROR
    end = MAX_END_ERROR if option == "max" else END_ERROR if option in OF_A_RUN else OTHER_END_ERROR
    found = {"loss_error": LOSS_ERROR, "gradient_error": gradient, "end_error": end}
    return {name: each[precision] for name, each in found.items()} | {"frozen_levels": 1}


def options(
    rows: Rows,
    device: str,
    engines: Sequence[str] = ENGINES,
    names: Sequence[str] = tuple(OPTIONS),
    size: int = 96,
    iterations: int = 40,
) -> None:
    """Each option on the device and on the CPU: loss and gradient of one picture, and the result of a short run.

    Engines after the first try those of OF_THE_ENGINE.
    """
    trial = Trial(size, iterations)
    for name in engines:
        with rows.attempt(name):
            stylizer = Stylizer(trial.problem.weights, *cases.ENGINES[name])
            own = names if name == engines[0] else [each for each in names if each in OF_THE_ENGINE]
            for option in own:
                with rows.attempt(f"{name} {option}"):
                    errors = trial.errors(trial.found(stylizer, option), option)
                    most = limits(option, stylizer.precision)
                    rows.add(f"{name} {option}", all(errors[each] <= most[each] for each in errors), **errors)


def going_on(rows: Rows, device: str, engines: Iterable[str] = ENGINES, size: int = 128, iterations: int = 30) -> None:
    """A run that goes on from a checkpoint ends where it would have, a frame of a video where a CPU has it; losses and
    gradient through windows are those of the whole picture; threads do not disturb each other."""
    problem = cases.load(size)
    content, style = problem.content.rgb, problem.style.rgb
    for name in engines:
        with rows.attempt(name):
            stylizer = Stylizer(problem.weights, *cases.ENGINES[name])
            for optimizer in ("lbfgs", "adam"):
                with rows.attempt(f"{name} {optimizer}, resumed"):
                    config = replace(problem.config, iterations=iterations, optimizer=optimizer)
                    step = next(islice(stylizer.steps(content, style, config), iterations // 2, None))
                    *_, last = stylizer.steps(content, style, config, resume=step.checkpoint())
                    whole = stylizer(content, style, config)
                    found, truth = (last.image, last.loss), (whole.image, whole.trace[-1][1])
                    _compare(rows, f"{name} {optimizer}, resumed", found, truth)
            with rows.attempt(f"{name}, a frame of a video"):
                _frame(rows, name, stylizer, problem, iterations)
            with rows.attempt(f"{name}, through windows"):
                _windows(rows, name, stylizer, problem)
            with rows.attempt(f"{name}, threads"):
                _threads(rows, name, stylizer, problem, replace(problem.config, iterations=iterations))


def _frame(rows: Rows, name: str, stylizer: Stylizer, problem: cases.Problem, iterations: int) -> None:
    """A frame that begins as another picture, and is held to half of it, on the device and on the CPU."""
    shape = problem.start[0].permute(1, 2, 0).numpy()
    certain = np.zeros(shape.shape[:2], np.float32)
    certain[:, : shape.shape[1] // 2] = 1
    carried = Carried(images.Picture(shape[::-1].copy()), certain, 30.0)
    config = replace(problem.config, scales=1, iterations=iterations, history=GPU_HISTORY)
    given = problem.content.rgb, problem.style.rgb, config
    ends = [
        list(each.steps(*given, carried=carried))[-1] for each in (stylizer, Stylizer(problem.weights, "cpu", "fp32"))
    ]
    error = abs(ends[0].loss / ends[1].loss - 1)
    held = [float((certain[..., None] * abs(end.picture.rgb - carried.picture.rgb)).mean()) for end in ends]
    passed = error < END_ERROR[stylizer.precision] and abs(held[0] / held[1] - 1) < 0.1
    rows.add(f"{name}, a frame of a video", passed, loss_error=error, moved=held[0], moved_on_cpu=held[1])


def _windows(rows: Rows, name: str, stylizer: Stylizer, problem: cases.Problem) -> None:
    """Four windows, without and with masks and means, against the same engine on all of the picture."""
    content = images.resize(problem.content, (WINDOW + 80, WINDOW + 39))
    picture, across = (np.random.default_rng(seed).random(content.rgb.shape, np.float32) for seed in (0, 1))
    for kind, masks in (("gram", None), ("wasserstein", [across[..., 0]])):
        config = replace(problem.config, style_loss=kind, style_size=WINDOW + 40)
        given = picture, content, problem.style
        whole, found = (
            stylizer.evaluate(*given, each, masks=masks) for each in (config, replace(config, window=WINDOW))
        )
        errors = {
            "loss_error": abs(found.loss / whole.loss - 1),
            "gradient_error": float(np.linalg.norm(found.gradient - whole.gradient) / np.linalg.norm(whole.gradient)),
        }
        passed = all(
            errors[each] <= most for each, most in limits("default", stylizer.precision).items() if each in errors
        )
        rows.add(f"{name}, through windows, {kind}", passed, **errors)


def _threads(rows: Rows, name: str, stylizer: Stylizer, problem: cases.Problem, config: Config) -> None:
    """Four unlike pictures, two of them of one size, on as many threads, and one after the other."""
    contents, style = (problem.content, problem.style, mosaic(), geometric()), engraving()

    def paint(content: Any) -> tuple[Image.Image, float]:
        result = stylizer(content, style, config)
        return result.image, result.trace[-1][1]

    with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(len(contents)) as together:
        truths = list(alone.map(paint, contents))
        for i, (found, truth) in enumerate(zip(together.map(paint, contents), truths, strict=True)):
            _compare(rows, f"{name}, thread {i + 1}", found, truth)


def _compare(rows: Rows, name: str, found: tuple[Image.Image, float], truth: tuple[Image.Image, float]) -> None:
    """Pictures and losses of two runs that should be the same."""
    levels = np.abs(np.asarray(found[0], int) - np.asarray(truth[0], int)).max(axis=2)
    share = float((levels > LEVELS).mean())
    error = abs(found[1] / truth[1] - 1)
    rows.add(name, error < 0.01 and share <= FEW, loss_error=error, pixel_levels=int(levels.max()), pixels_off=share)


def pictures(
    rows: Rows,
    device: str,
    engine: str = "engine-cudnn-fp16",
    default: Config | None = None,
    size: int = 160,
    iterations: int = 60,
) -> None:
    """Every control and the default run, to be looked at: controls.png and default.png beside the report."""
    with rows.attempt(engine):
        problem = cases.load(size)
        stylizer = Stylizer(problem.weights, *cases.ENGINES[engine])
        rows.picture("default", stylizer(problem.content, problem.style, default).image)
        cells = list(controls.cells(stylizer, size, iterations))
        rows.picture("controls", sheet.draw(cells, controls.COLUMNS))


SECTIONS: dict[str, Callable[[Rows, str], None]] = {"options": options, "going-on": going_on, "pictures": pictures}
