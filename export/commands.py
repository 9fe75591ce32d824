"""What all command lines of the package share: errors of one line, hints, and the line that installs what is missing.

Standard library only.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

_KINDS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_NUMBERS = (errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG)
_MEANT = {"gpu": "cudnn"}  # where the nearest word is another thing


class Parser(argparse.ArgumentParser):
    """A parser whose options have one name and whose errors are one line."""

    def __init__(self, name: str, description: str) -> None:
        super().__init__(prog=f"python -m {name}", description=description, allow_abbrev=False)
        self._name = name

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        flags = list(self._option_string_actions)
        near = difflib.get_close_matches(unknown[1].replace("_", "-"), flags, 1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else "--help lists the options"
        self.exit(2, f"{self._name}: {message} ({hint})\n")


def choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`, else raise ValueError with the nearest one."""
    allowed = list(choices)
    if value in allowed:
        return value
    raise ValueError(f"{name} {value!r} is unknown: {nearest(value, allowed)}choose from {', '.join(allowed)}")


def nearest(value: object, choices: Iterable[str]) -> str:
    """A question after the one of `choices` that may have been meant, or nothing."""
    near = difflib.get_close_matches(_MEANT.get(str(value), str(value)), list(choices), n=1)
    return f"did you mean {near[0]}? " if near else ""


def wrong_file(error: BaseException) -> bool:
    """Whether an error says that a file was named which is not there, or not to be read or written."""
    return isinstance(error, _KINDS) or (isinstance(error, OSError) and error.errno in _NUMBERS)


def install_line(extra: str) -> str:
    """The command that installs an extra of this package: from its checkout, if that is where it runs."""
    root = Path(__file__).resolve().parents[1]
    return f"pip install '{root if (root / 'pyproject.toml').is_file() else 'gatys-engine'}[{extra}]'"
