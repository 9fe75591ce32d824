"""Contact sheets: one picture for each combination of some options, labelled, in one file."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from . import image, manifest
from .config import Config, options
from .export.commands import choice
from .jobs import BREAKS, Job, brief
from .painting import Clock, begin, progress, size
from .stylizer import Stylizer

_CELL, _GAP, _LINE = 384, 8, 18  # pixels: longest side of a cell, gap, height of a line of text
_LIMIT = 400  # pictures

Axis = tuple[str, list[tuple[str, Any]]]  # option, and (text, value) of each


def axes(texts: Sequence[str], parse: Callable[[str, Any, str], Any]) -> list[Axis]:
    """OPTION=VALUE,VALUE.. each; where values hold commas, they are separated by `;`. ValueError for a mistake."""
    known = {option.name.replace("_", "-"): option for option in options()}
    found: dict[str, Axis] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        parts = [part for part in values.split(";" if ";" in values else ",") if part]
        if not equals or not parts:
            raise ValueError(f"--grid {text}: give OPTION=VALUE,VALUE...")
        option = known[choice("--grid: option", name, known)]
        if name in found:
            raise ValueError(f"--grid names {name} twice")
        try:
            found[name] = option.name, [(f"{name} {part}", parse(option.name, option.default, part)) for part in parts]
        except ValueError as error:
            raise ValueError(f"--grid {text}: {error}") from error
    if math.prod(len(values) for _, values in found.values()) > _LIMIT:
        raise ValueError(f"--grid: more than {_LIMIT} pictures")
    return list(found.values())


def configs(config: Config, grid: Sequence[Axis]) -> list[tuple[list[str], Config]]:
    """(labels, options) of each cell, in rows: the last axis runs to the right, the others down."""
    names = [name for name, _ in grid]
    cells = []
    for values in itertools.product(*(values for _, values in grid)):
        changes = {name: value for name, (_, value) in zip(names, values, strict=True)}
        cells.append(([text for text, _ in values], replace(config, **changes)))
    if grid and any(each.init == "-" for _, each in cells):
        raise ValueError("--grid: init - can be read for one picture only, give a file")
    return cells


def make(
    stylizer: Stylizer, job: Job, cells: Sequence[tuple[list[str], Config]], columns: int, given: argparse.Namespace
) -> tuple[int, str]:
    """Make the pictures of the cells and the sheet, whose manifest lists the manifests of the cells.

    Returns exit status and message, 0 and nothing if all went well. Cells that an interrupt left out, or whose runs
    broke, stay blank. Raises what a run raises that cannot begin, or breaks by a mistake while there is no picture yet.
    """
    for _, config in cells:
        begin(stylizer, job, config)
    *_, extent = _layout([(labels, size(job, config)) for labels, config in cells], columns)
    image.check_size(job.out, extent)
    made: dict[int, Image.Image] = {}
    records, failures, status = [], [], 0
    try:
        for i, (labels, config) in enumerate(cells):
            start, losses, name = time.perf_counter(), [], ", ".join(labels)
            try:
                for step in progress(begin(stylizer, job, config), given, name, Clock(job, config)):
                    losses.append((step.iteration, step.loss))
                record = step.manifest(losses[-1:], time.perf_counter() - start)
                picture = step.image
            except (*BREAKS, ValueError, TypeError) as error:
                if not made and isinstance(error, ValueError | TypeError):
                    raise
                status = 1
                failures.append(f"{name}: {brief(error)}")
            else:
                records.append({"labels": labels} | record)
                made[i] = _fit(picture, min(_CELL, max(picture.size)))  # there may be hundreds
    except KeyboardInterrupt:
        status = 130
        failures.append("interrupted")
    if made:
        drawn = draw([(labels, made.get(i)) for i, (labels, _) in enumerate(cells)], columns)
        image.save(drawn, job.out, manifest.of_sheet(records))
        if failures:
            failures.append(f"the other pictures are in {job.out}")
    return status, "; ".join(failures)


def draw(cells: Sequence[tuple[Sequence[str], Image.Image | None]], columns: int) -> Image.Image:
    """The labelled pictures in rows of `columns`, RGB; there is one at least, the others may be missing."""
    sizes = [(labels, picture.size if picture else None) for labels, picture in cells]
    longest, width, height, extent = _layout(sizes, columns)
    text = _LINE * max(len(labels) for labels, _ in cells)
    sheet = Image.new("RGB", extent, "white")
    pen, font = ImageDraw.Draw(sheet), _font()
    for i, (labels, picture) in enumerate(cells):
        left, top = _GAP + i % columns * width, _GAP + i // columns * height
        for line, label in enumerate(labels):
            pen.text((left, top + line * _LINE), label, "black", font)
        if picture:
            shown = _fit(picture, longest)
            sheet.paste(shown, (left, top + text), shown if shown.mode == "RGBA" else None)
    return sheet


def _layout(
    cells: Sequence[tuple[Sequence[str], tuple[int, int] | None]], columns: int
) -> tuple[int, int, int, tuple[int, int]]:
    """Of cells (labels, size): longest side of a picture, width and height of a cell with its gap, sheet size."""
    sizes = [size for _, size in cells if size]
    longest = min(_CELL, max(map(max, sizes)))
    shown = [_fitted(size, longest) for size in sizes]
    font, texts = _font(), [labels for labels, _ in cells]
    width = _GAP + max(
        *(math.ceil(font.getlength(text)) for labels in texts for text in labels), *(w for w, _ in shown)
    )
    height = _GAP + _LINE * max(map(len, texts)) + max(h for _, h in shown)
    rows = -(-len(cells) // columns)
    return longest, width, height, (_GAP + columns * width, _GAP + rows * height)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(_LINE - 4)


def _fit(picture: Image.Image, longest: int) -> Image.Image:
    return picture.resize(_fitted(picture.size, longest), Image.Resampling.LANCZOS)


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    width, height = (max(1, round(side * longest / max(size))) for side in size)
    return width, height
