"""Manifests: what a picture was made of, carried by the picture, so that it can be made again.

A manifest is a JSON object. PNG carries it as iTXt text, JPEG and WebP as the EXIF user comment; beside a picture of
another format stands OUT.json. Of folders it says nothing: files are named without them, and found again by their names
next to the manifest, or by being given once more.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from . import __version__
from .config import STARTS, Config

_KEY = "gatys-engine"  # of the text in a PNG
_COMMENT, _EXIF, _ASCII = 0x9286, 0x8769, b"ASCII\0\0\0"
_FORMAT = 1
_LONGEST = 60_000  # characters: an EXIF block holds 64 kB
_LOSSES = 500  # of the trace
_ALPHA = ("alpha",)  # the word that may stand in the place of the file of a mask
_PICTURE = {"name": (str, None), "sha256": str}
_SHAPE = {  # of a manifest that can be replayed: types, keys of objects, [shape of all in a list], (alternatives)
    "options": {"init": str},
    "files": dict,
    "content": (_PICTURE, None),
    "styles": [_PICTURE],
    "masks": ([(str, [str])], None),
    "freeze": (str, None),
    "engine": dict.fromkeys(("device", "precision", "weights", "sha256"), str),
    "versions": dict,
    "iterations": {"done": int, "total": int},
}
_LIBRARIES = ("torch", "numpy", "numba", "pillow")


def inputs(config: Config, masks: Any, freeze: Any) -> dict[str, Any]:
    """The part of a manifest that is to be made when the run begins: options, masks, and the sha256 of files they name.

    `masks` and `freeze` are as in a call; what is no file of them cannot be replayed.
    """
    files: dict[str, str] = {}
    if masks is not None:
        pairs = masks if isinstance(masks, list | tuple) else [masks]
        masks = [pair[0] if isinstance(pair, list | tuple) and pair[1] is None else pair for pair in pairs]
    return {
        "options": asdict(config) | {"init": _portable(config.init, files, STARTS)},
        "masks": _portable(masks, files, _ALPHA),
        "freeze": _portable(freeze, files, _ALPHA),
        "files": files,
    }


def named(source: Any) -> tuple[str | None, str]:
    """(name of its file, sha256) of a loaded picture or of style targets, which have no name."""
    return getattr(source, "name", None), source.digest


def describe(
    inputs: Mapping[str, Any],
    content: tuple[str | None, str] | None,
    styles: Sequence[tuple[str | None, str]],
    engine: Mapping[str, str],
    losses: Sequence[tuple[int, float]],
    seconds: float,
    total: int,
) -> dict[str, Any]:
    """The manifest of a run.

    `inputs` is what the function of that name gave, `content` (None without) and `styles` are (name, sha256 of the
    decoded picture), `engine` the device, precision, weights and their sha256, `losses` (iteration, loss), of which at
    most some 500 are kept, and none that is no number: JSON has no NaN. `total` are the iterations of the run.
    """
    done = losses[-1][0] if losses else 0
    losses = [each for each in losses if math.isfinite(each[1])]
    return {
        "format": _FORMAT,
        **inputs,
        "content": content and {"name": content[0], "sha256": content[1]},
        "styles": [{"name": name, "sha256": digest} for name, digest in styles],
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
    own = {"python": platform.python_version(), "gatys-engine": __version__}
    return own | {name: metadata.version(name) for name in _LIBRARIES}


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


def extract(picture: Image.Image) -> str | None:
    """The text of the manifest in a picture, or None."""
    if _KEY in picture.info:
        return str(picture.info[_KEY])
    comment = picture.getexif().get_ifd(_EXIF).get(_COMMENT, b"")
    if isinstance(comment, bytes) and comment.startswith(_ASCII):
        return comment.removeprefix(_ASCII).decode("ascii", "replace")
    return None


def parse(text: str | bytes, path: str) -> dict[str, Any]:
    """The manifest of a run from the text in or beside `path`. Raises ValueError if it is none."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        manifest = None
    if isinstance(manifest, dict) and manifest.get("format", _FORMAT) != _FORMAT:
        raise ValueError(f"{path} has a manifest of format {manifest['format']}, this version reads {_FORMAT}")
    if isinstance(manifest, dict) and "sheet" in manifest:
        raise ValueError(f"{path} is a contact sheet: replay a manifest of its list")
    if not _fits(manifest, _SHAPE):
        raise ValueError(f"{path} holds no manifest of this program")
    return dict(manifest)


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value from JSON has a shape such as _SHAPE."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and _fits(value[key], shape[key]) for key in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(each, shape[0]) for each in value)
    if isinstance(shape, tuple):
        return any(_fits(value, each) for each in shape)
    return value is None if shape is None else isinstance(value, shape)


def config(manifest: Mapping[str, Any], folder: Path) -> Config:
    """The options again, with files found in `folder`. Raises ValueError if one differs or an option is unknown."""
    start = _found(manifest["options"]["init"], manifest["files"], folder, STARTS)
    try:
        return Config(**manifest["options"] | {"init": start})
    except TypeError as error:
        raise ValueError(f"the manifest's options are not those of this version: {error}") from error


def regions(manifest: Mapping[str, Any], folder: Path) -> tuple[list[Any] | None, Any]:
    """Masks and freeze again, as `config` finds files. Raises ValueError if one differs."""
    masks, freeze = (_found(manifest[name], manifest["files"], folder, _ALPHA) for name in ("masks", "freeze"))
    return masks and list(masks), freeze


def _portable(value: Any, files: dict[str, str], words: Sequence[str]) -> Any:
    """The value, of files but for `words`, with files named without their folders.

    Their sha256 goes into `files`, or nothing for a name that does not tell which file it was.
    """
    if isinstance(value, list | tuple):
        return [_portable(each, files, words) for each in value]
    if value is None or (isinstance(value, str) and value in words):
        return value
    if not isinstance(value, str | os.PathLike):  # an array, say
        return files.setdefault("", "")
    path = Path(value)
    name = f"./{path.name}" if path.name in words else path.name
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""  # a pipe is read only once
    if files.setdefault(name, digest) != digest:
        files[name] = ""
    return name


def _found(value: Any, files: Mapping[str, str], folder: Path, words: Sequence[str]) -> Any:
    """The reverse of `_portable`; lists become tuples."""
    if value is None or value in words:
        return value
    if not isinstance(value, str):
        return tuple(_found(each, files, folder, words) for each in value)
    if not files.get(value):
        text = "does not tell which file it was, a pipe or one of several, or was none: no replay is possible"
        raise ValueError(f"{value!r} {text}")
    path = f"{folder}/{Path(value).name}"  # a Path would make a word of ./alpha
    if not Path(path).is_file():
        raise FileNotFoundError(errno.ENOENT, "No such file: put it beside the manifest", path)
    if hashlib.sha256(Path(path).read_bytes()).hexdigest() != files[value]:
        raise ValueError(f"{path} is not the file of the manifest: its sha256 differs")
    return path
