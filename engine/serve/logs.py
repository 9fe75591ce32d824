"""The log on stderr: a line for each event, as text or JSON, with what `extra` says; never a picture or a token."""

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
        head = {"time": moment, "level": record.levelname.lower(), "logger": record.name, "event": record.getMessage()}
        if record.exc_info:
            extra["traceback"] = self.formatException(record.exc_info)
        if self._json:
            return json.dumps({**head, **extra}, default=str)
        tail = " ".join(f"{name}={value}" for name, value in extra.items())
        return f"{moment} {record.levelname.lower():7} {head['event']} {tail}".rstrip()


def set_up(form: str) -> None:
    """Send the log of this process to stderr, as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(form == "json"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
