"""Make a picture again by its manifest: its inputs, found and checked, and the engine it was made with."""

from __future__ import annotations

import argparse
import errno
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import image, manifest
from .config import Config
from .jobs import Job
from .painting import load
from .stylizer import Stylizer

log = logging.getLogger(__name__)


def read(path: str) -> dict[str, Any]:
    """The manifest in or beside a picture, or in a JSON file. Raises ValueError if there is none, OSError."""
    with Path(path).open("rb") as file:
        bare = file.read(64).lstrip().startswith(b"{")
    if bare:
        return manifest.parse(Path(path).read_bytes(), path)
    with image.described(path) as picture:
        text: str | bytes | None = manifest.extract(picture)
    if text is None and manifest.beside(path).is_file():
        text = manifest.beside(path).read_bytes()
    if text is None:
        raise ValueError(f"{path} carries no manifest")
    return manifest.parse(text, path)


def sources(record: Mapping[str, Any], folder: Path) -> list[str]:
    """Where content and styles of a manifest should be: by their names in `folder`. Raises ValueError without names."""
    wanted = _pictures(record)
    if any(each and each["name"] is None for each in wanted):
        raise ValueError("the manifest's pictures came without names: give CONTENT and STYLE, or --demo")
    found = ["none" if each is None else str(folder / Path(each["name"]).name) for each in wanted]
    if lost := [each for each in found if each != "none" and not Path(each).is_file()]:
        text = "No such file: put it beside the manifest, or give CONTENT and STYLE again"
        raise FileNotFoundError(errno.ENOENT, text, lost[0])
    return found


def _pictures(record: Mapping[str, Any]) -> list[Any]:
    return [record["content"], *(record["styles"] or [None])]


def inputs(record: Mapping[str, Any], folder: Path, sources: Sequence[Any], out: str) -> tuple[Config, Job]:
    """Options and job of a manifest, with the pictures from `sources`; other files by their names from `folder`.

    Raises ValueError if a picture or another file is not that of the manifest, OSError if it is not there.
    """
    wanted = _pictures(record)
    if len(sources) != len(wanted):
        raise ValueError(f"the manifest has {len(wanted) - 1} styles, {len(sources) - 1} are given")
    loaded = [load(source) for source in sources]
    for i, (each, own) in enumerate(zip(loaded, wanted, strict=True)):
        name, digest = (None, None) if each is None else manifest.named(each)
        if digest != (own and own["sha256"]):
            kind = f"style {i}" if i else "the content"
            raise ValueError(f"{name or 'the picture'} is not {kind} of the manifest: its sha256 differs")
    masks, freeze = manifest.regions(record, folder)
    return manifest.config(record, folder), Job(loaded[0], tuple(loaded[1:]), out, masks, freeze)


def take_engine(record: Mapping[str, Any], folder: Path, given: argparse.Namespace) -> None:
    """Device, precision and weights of the manifest, where none were named; its precision goes with its device.

    That of a run which fell back is left to the device, so that this one does the same.
    """
    engine = record["engine"]
    if given.device == "auto":
        given.device = engine["device"]
    if given.precision == "auto" and given.device == engine["device"] and "began" not in engine:
        given.precision = engine["precision"]
    if given.weights == "auto":
        name = engine["weights"]
        given.weights = name if name in ("embedded", "imagenet") else str(folder / Path(name).name)


def check_engine(record: Mapping[str, Any], stylizer: Stylizer, config: Config) -> None:
    """Raise ValueError for other weights; warn of another device or version, which may change the last bits."""
    engine = record["engine"]
    if stylizer.weights_digest(config.for_weights(stylizer.weights_kind).layers) != engine["sha256"]:
        raise ValueError("the weights are not those of the manifest: their sha256 differs")
    ours = manifest.versions() | {"device": stylizer.device, "precision": stylizer.precision}
    theirs = dict(record["versions"]) | {"device": engine["device"]}
    theirs["precision"] = engine.get("began", engine["precision"])
    for name, value in theirs.items():
        if ours.get(name) != value:
            log.warning("%s was %s, is %s: the picture may differ a little", name, value, ours.get(name))
    if record["iterations"]["done"] < record["iterations"]["total"]:
        log.warning("the picture's run was interrupted: this makes the whole one")
