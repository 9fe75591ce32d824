"""What may be wrong with a file that somebody named."""

from __future__ import annotations

import errno

_KINDS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
_NUMBERS = (errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG)


def wrong_file(error: BaseException) -> bool:
    """Whether an error says that a file was named which is not there, or not to be read or written."""
    return isinstance(error, _KINDS) or (isinstance(error, OSError) and error.errno in _NUMBERS)
