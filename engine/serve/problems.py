"""Errors as RFC 9457 problem documents, and the checks of what a client sends."""

from __future__ import annotations

import io
import json
import logging
import re
import sqlite3
import warnings
from dataclasses import asdict
from http import HTTPStatus
from typing import Any

from PIL import Image, UnidentifiedImageError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from engine.config import STARTS, Config, check_option, least_side
from engine.export.vgg import MIN_SIDE

from .settings import Settings
from .store import full

log = logging.getLogger(__name__)

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
_WORD = re.compile(
    r"[A-Za-z0-9_:.-]{1,40}"
)  # what an option may be: no folder can be named with it; `init` is checked apart


class Problem(HTTPException):
    """What is wrong with a request: an HTTP status and one line for a person."""

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(status, detail)
        self.retry_after = retry_after

    def response(self) -> Response:
        """The problem document."""
        status = self.status_code
        body: dict[str, Any] = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        text = json.dumps({**body, "detail": self.detail})
        return Response(text, status, headers, media_type="application/problem+json")


def of_storage(error: Exception) -> Problem:
    """The problem of a store, or of an upload's temporary file, that could not be written."""
    if full(error):
        return Problem(507, "the disk is full", retry_after=60)
    if isinstance(error, sqlite3.Error) and "locked" in str(error):
        return Problem(503, "the store is busy", retry_after=5)
    return Problem(500, "the store could not be written")


def check_picture(name: str, data: bytes, max_pixels: int) -> tuple[int, int]:
    """(width, height) of an uploaded picture, looked at before it is decoded, then decoded. Raises Problem."""
    if not data:
        raise Problem(422, f"{name} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise Problem(413, f"{name} has {width} x {height} pixels; the limit is {max_pixels} in all")
            image.load()
    except UnidentifiedImageError as error:
        raise Problem(415, f"{name} is not a picture; send {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise Problem(413, f"{name} has too many pixels; the limit is {max_pixels} in all") from error
    except Problem:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise Problem(422, f"{name} is damaged ({' '.join(str(error).split())[:200]})") from error
    return width, height


def check_style(size: tuple[int, int], settings: Settings) -> None:
    """Refuse a style that would be looked at beyond the largest size, for its short side. Raises Problem."""
    side = least_side(size)
    if side > settings.max_size:
        raise Problem(
            422,
            f"style has {size[0]} x {size[1]} pixels: its long side would be {side} for a short one of {MIN_SIDE}, "
            f"and this server paints up to {settings.max_size}; crop it",
        )


def check_options(text: str, size: tuple[int, int], styles: int, settings: Settings) -> str:
    """The options of a job as canonical JSON, checked against `Config`, the content's size and the number of styles.

    Raises Problem.
    """
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"options is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise Problem(422, "options has to be a JSON object")
    try:
        for name, value in values.items():
            check_option(name)
            _check_words(name, value)
        config = Config(**values).sized(max(size))
        if config.start_file is not None:
            raise ValueError(f"init {config.init!r}: choose from {', '.join(STARTS)}")
        config.check_for_content()
        largest = max(each.style_side(config.long_side) for each in config.for_styles(styles))
        for name, side in (("size", config.long_side), ("style size", largest)):
            if side > settings.max_size:
                raise ValueError(f"{name} {side}: this server paints up to {settings.max_size}")
        config.schedule(max(size) / min(size))
        config.style_shares(styles)
    except (ValueError, TypeError, OverflowError) as error:
        raise Problem(422, " ".join(str(error).split())) from error
    return json.dumps({name: value for name, value in asdict(config).items() if name in values}, sort_keys=True)


def _check_words(name: str, value: Any) -> None:
    """Refuse what could name a file: options are numbers, words and lists of them."""
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, str) and not _WORD.fullmatch(each):
            raise ValueError(f"{name} {each[:80]!r}: give a word of the documentation")
        if isinstance(each, dict | list):
            raise TypeError(f"{name} has to be a number, a word or a list of them")
