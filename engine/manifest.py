"""Manifests: what a picture was made of, carried by the picture, so that it can be made again.

A manifest is a JSON object. PNG carries it as iTXt text, JPEG and WebP as the EXIF user comment; beside a picture of
another format stands OUT.json. Of folders it says nothing: files are named without them, and found again by their names
next to the manifest, or by being given once more.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from .config import Config

_KEY = "gatys-engine"  # of the text in a PNG
_COMMENT, _EXIF, _ASCII = 0x9286, 0x8769, b"ASCII\0\0\0"
_FORMAT = 1
_LONGEST = 60_000  # characters: an EXIF block holds 64 kB
_LOSSES = 500  # of the trace
_LIBRARIES = ("gatys-engine", "torch", "numpy", "numba", "pillow")


def describe(
    config: Config,
    content: tuple[str | None, str] | None,
    styles: Sequence[tuple[str | None, str]],
    masks: list[Any] | None,
    freeze: str | None,
    engine: Mapping[str, str],
    losses: Sequence[tuple[int, float]],
    seconds: float,
    total: int,
) -> dict[str, Any]:
    """The manifest of a run.

    `content` (None without) and `styles` are (name, sha256 of the decoded picture), `masks` and `freeze` as in a call,
    `engine` the device, precision, weights and
    their sha256, `losses` (iteration, loss), of which at most some 500 are kept, `total` the iterations of the run.
    """
    files: dict[str, str] = {}
    done = losses[-1][0] if losses else 0
    return {
        "format": _FORMAT,
        "options": {name: _portable(value, files) for name, value in asdict(config).items()},
        "files": files,
        "content": content and {"name": content[0], "sha256": content[1]},
        "styles": [{"name": name, "sha256": digest} for name, digest in styles],
        "masks": _portable(masks, files),
        "freeze": _portable(freeze, files),
        "engine": dict(engine),
        "versions": versions(),
        "iterations": {"done": done, "total": total},
        "losses": [list(each) for each in losses[:: -(-len(losses) // _LOSSES) or 1]],
        "timings": {"seconds": round(seconds, 3)},
    }


def of_sheet(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifest of a contact sheet: those of its pictures, which can be replayed one by one."""
    return {"format": _FORMAT, "sheet": list(cells)}


def versions() -> dict[str, str]:
    """Of Python and of the libraries that a result depends on."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in _LIBRARIES}


def holds(kind: str) -> bool:
    """Whether a picture of this format of Pillow can carry its manifest."""
    return kind in ("PNG", "JPEG", "WEBP")


def embed(kind: str, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options of Pillow's `save` that put the manifest into a picture of this format; none if it cannot hold it."""
    if manifest is None or not holds(kind):
        return {}
    text = json.dumps(manifest)
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(_KEY, text)
        return {"pnginfo": info}
    if len(text) > _LONGEST:  # of a contact sheet
        return {}
    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_COMMENT] = _ASCII + text.encode("ascii")
    return {"exif": exif}


def beside(path: str) -> Path:
    """Where the manifest of a picture stands whose format cannot hold it."""
    return Path(f"{path}.json")


def read(path: str) -> dict[str, Any]:
    """The manifest in or beside a picture, or in a JSON file. Raises ValueError if there is none, OSError."""
    data = Path(path).read_bytes()
    text: Any = data
    if not data.lstrip().startswith(b"{"):
        text = _embedded(path)
        if text is None and beside(path).is_file():
            text = beside(path).read_bytes()
    if text is None:
        raise ValueError(f"{path} carries no manifest")
    try:
        manifest = json.loads(text)
        if manifest["format"] != _FORMAT:
            raise ValueError(f"{path} has a manifest of format {manifest['format']}, this version reads {_FORMAT}")
        if "sheet" in manifest:
            raise ValueError(f"{path} is a contact sheet: replay a manifest of its list")
        for name in ("options", "files", "content", "styles", "masks", "freeze", "engine", "versions", "iterations"):
            manifest[name]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no manifest of this program") from error
    return dict(manifest)


def _embedded(path: str) -> str | None:
    try:
        with Image.open(path) as picture:
            picture.load()
            if _KEY in picture.info:
                return str(picture.info[_KEY])
            comment = picture.getexif().get_ifd(_EXIF).get(_COMMENT, b"")
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise ValueError(f"{path} is neither a picture nor a manifest ({error})") from error
    if isinstance(comment, bytes) and comment.startswith(_ASCII):
        return comment.removeprefix(_ASCII).decode("ascii", "replace")
    return None


def config(manifest: Mapping[str, Any], folder: Path) -> Config:
    """The options again, with files found in `folder`. Raises ValueError if one differs or an option is unknown."""
    try:
        values = {name: _found(value, manifest["files"], folder) for name, value in manifest["options"].items()}
        return Config(**values)
    except TypeError as error:
        raise ValueError(f"the manifest's options are not those of this version: {error}") from error


def regions(manifest: Mapping[str, Any], folder: Path) -> tuple[list[Any] | None, Any]:
    """Masks and freeze again, as `config` finds files. Raises ValueError if one differs."""
    masks, freeze = (_found(manifest[name], manifest["files"], folder) for name in ("masks", "freeze"))
    return masks and list(masks), freeze


def _portable(value: Any, files: dict[str, str]) -> Any:
    """The value with files named without their folders; their sha256 goes into `files`."""
    if isinstance(value, dict):
        return {key: _portable(each, files) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(each, files) for each in value]
    if not isinstance(value, str):
        return value
    parts = re.split(r"([:,])", value) if not Path(value).is_file() else [value]
    for i, part in enumerate(parts):
        path = Path(part)
        if path.suffix and path.is_file():  # `content` is a word even where a file has that name
            files[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            parts[i] = path.name
    return "".join(parts)


def _found(value: Any, files: Mapping[str, str], folder: Path) -> Any:
    """The reverse of `_portable`; lists become tuples."""
    if isinstance(value, dict):
        return {key: _found(each, files, folder) for key, each in value.items()}
    if isinstance(value, list):
        return tuple(_found(each, files, folder) for each in value)
    if not isinstance(value, str):
        return value
    parts = re.split(r"([:,])", value) if value not in files else [value]
    for i, part in enumerate(parts):
        if part in files:
            path = folder / part
            if hashlib.sha256(path.read_bytes()).hexdigest() != files[part]:
                raise ValueError(f"{path} is not the file of the manifest: its sha256 differs")
            parts[i] = str(path)
    return "".join(parts)
