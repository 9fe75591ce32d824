"""The log on stderr: a line for each event, as text or JSON, with what `extra` says; never a picture or a token.

Requests are logged with what clients made up, which must neither begin a line nor reach the terminal as it is.
"""

from __future__ import annotations

import json
import logging
import sys
import time

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class _Lines(logging.Formatter):
    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self._json = as_json

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _OWN}
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z"
        event = " ".join(record.getMessage().split())
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        if self._json:
            head = {"time": moment, "level": record.levelname.lower(), "logger": record.name, "event": event}
            return json.dumps({**head, **extra, **({"traceback": traceback} if traceback else {})}, default=str)
        tail = " ".join(f"{name}={_plain(str(value))}" for name, value in extra.items())
        line = f"{moment} {record.levelname.lower():7} {_plain(event, ' ')} {tail}".rstrip()
        return "\n    ".join([line, *(_plain(each, " ") for each in traceback.splitlines())])


def _plain(text: str, more: str = "") -> str:
    """The text, as a JSON string if it holds anything but printable ASCII and `more`."""
    return text if all("!" <= sign <= "~" or sign in more for sign in text) else json.dumps(text)


def set_up(form: str) -> None:
    """Send the log of this process to stderr, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(form == "json"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
