"""Checkpoints: a run that was interrupted, as safetensors bytes whose metadata is JSON.

A checkpoint holds the place in the schedule and all that the next iteration depends on. What it does not hold,
pictures, weights and options, it names by digest or value, and is refused for others.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
from torch import Tensor

_FORMAT = 5


@dataclass(frozen=True)
class Checkpoint:
    """A run after `iteration` iterations in all, at number `scale` of its schedule.

    `identity` is what the run was made of (see `Stylizer.steps`), `tensors` the optimiser's, by name, `note` what the
    caller keeps with it, of JSON.
    """

    identity: Mapping[str, Any]
    scale: int
    iteration: int
    tensors: Mapping[str, Tensor]
    note: Any = None

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise ValueError, naming what differs, unless the run that is to go on has this identity."""
        ours, own = json.loads(json.dumps(identity)), self.identity  # tuples become lists
        differing = [name for name in sorted(ours | own) if ours.get(name) != own.get(name)]
        if differing:
            values = [(name, own.get(name), ours.get(name)) for name in differing]
            shown = [f"{name} ({one}, here {other})" if _short(one, other) else name for name, one, other in values]
            raise ValueError(f"the checkpoint is of a run with another {', another '.join(shown)}")


def _short(*values: Any) -> bool:
    """Whether values can be told in a line: no digests, no lists."""
    return all(isinstance(value, str | int | float) and len(str(value)) <= 20 for value in values)


def dump(checkpoint: Checkpoint) -> bytes:
    """The checkpoint as bytes."""
    return safetensors.torch.save(*_sealed(checkpoint))


def write(checkpoint: Checkpoint, path: Path, room: int | None = None) -> None:
    """Write what `dump` gives to a file, without a copy in memory. Raises OSError, also for more than `room` bytes."""
    if room is not None and sum(tensor.nbytes for tensor in checkpoint.tensors.values()) > room:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    tensors, seal = _sealed(checkpoint)
    path.touch()
    mode = path.stat().st_mode & 0o7777  # safetensors puts a file of its own there, which others may not read
    try:
        safetensors.torch.save_file(tensors, path, seal)
        path.chmod(mode)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def _sealed(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, and the metadata that goes with them."""
    record = {
        "format": _FORMAT,
        "identity": checkpoint.identity,
        "scale": checkpoint.scale,
        "iteration": checkpoint.iteration,
        "note": checkpoint.note,
    }
    text = json.dumps(record, sort_keys=True)
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    seal = {"run": text, "sha256": _digest(text, tensors)}
    return tensors, {"checkpoint": json.dumps(seal)}  # of several entries the order would vary


def load(data: bytes) -> Checkpoint:
    """The checkpoint that `dump` wrote; raises ValueError if it is damaged or of another format."""
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        seal = _seal(data[8 : 8 + length])
        text, expected = seal["run"], seal["sha256"]
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError("the checkpoint is damaged, or is none") from error
    if _digest(text, tensors) != expected:
        raise ValueError("the checkpoint is damaged")
    record = json.loads(text)
    if record["format"] != _FORMAT:
        raise ValueError(f"the checkpoint has format {record['format']}, this version reads {_FORMAT}")
    return Checkpoint(record["identity"], record["scale"], record["iteration"], tensors, record["note"])


def note(path: str) -> Any:
    """The note in the file of a checkpoint that could be loaded, without its tensors."""
    with Path(path).open("rb") as file:
        seal = _seal(file.read(int.from_bytes(file.read(8), "little")))
    return json.loads(seal["run"])["note"]


def _seal(header: bytes) -> Any:
    return json.loads(json.loads(header)["__metadata__"]["checkpoint"])


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    state = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        state.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        state.update(tensors[name].numpy().reshape(-1).view(np.uint8).data)  # no copy of a long history
    return state.hexdigest()
