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
from .config import Config, choice, options
from .jobs import Job, brief
from .painting import BREAKS, begin, describe, progress
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
    return cells


def make(
    stylizer: Stylizer, job: Job, cells: Sequence[tuple[list[str], Config]], columns: int, given: argparse.Namespace
) -> tuple[int, str]:
    """Make the pictures of the cells and the sheet, whose manifest lists the manifests of the cells.

    Returns exit status and message, 0 and nothing if all went well. Cells that an interrupt left out, or whose runs
    broke, stay blank.
    """
    made: dict[int, Image.Image] = {}
    records, failures, status = [], [], 0
    try:
        for i, (labels, config) in enumerate(cells):
            start, losses, name = time.perf_counter(), [], ", ".join(labels)
            steps = begin(stylizer, job, config)
            try:
                for step in progress(steps, given, name):
                    losses.append((step.iteration, step.loss))
                made[i] = step.image
            except BREAKS as error:
                status = 1
                failures.append(f"{name}: {brief(error)}")
                continue
            record = describe(stylizer, config, job, losses[-1:], time.perf_counter() - start, step)
            records.append({"labels": labels} | record)
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
    longest = min(_CELL, max(max(picture.size) for _, picture in cells if picture))
    fitted = [(labels, picture and _fit(picture, longest)) for labels, picture in cells]
    font = ImageFont.load_default(_LINE - 4)
    widest = max(math.ceil(font.getlength(text)) for labels, _ in cells for text in labels)
    width = _GAP + max(widest, *(picture.width for _, picture in fitted if picture))
    text = _LINE * max(len(labels) for labels, _ in cells)
    height = _GAP + text + max(picture.height for _, picture in fitted if picture)
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (_GAP + columns * width, _GAP + rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (labels, picture) in enumerate(fitted):
        left, top = _GAP + i % columns * width, _GAP + i // columns * height
        for line, label in enumerate(labels):
            pen.text((left, top + line * _LINE), label, "black", font)
        if picture:
            sheet.paste(picture, (left, top + text), picture if picture.mode == "RGBA" else None)
    return sheet


def _fit(picture: Image.Image, longest: int) -> Image.Image:
    scale = longest / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
