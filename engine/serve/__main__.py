"""`python -m engine.serve`: the command line of the service. What it needs is imported after the options were read."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sqlite3
import sys
from collections.abc import Sequence
from dataclasses import fields
from types import FrameType
from typing import Any

from engine.export.commands import Parser, install_line
from engine.jobs import brief, fail

from .settings import Settings

_NAME = "engine.serve"
_GRACE = 2  # seconds that open requests have after SIGTERM
_CONNECTIONS = 1024  # at the same time
_FILES = 4 * _CONNECTIONS  # that may be open: a connection may hold an upload or a picture


def _parser() -> argparse.ArgumentParser:
    parser = Parser(_NAME, "Style transfer as an HTTP service, with a page.")
    for option in fields(Settings):
        text = option.metadata["help"] + (f" (default {option.default})" if option.default != "" else "")
        kind: Any = type(option.default)
        parser.add_argument("--" + option.name.replace("_", "-"), type=kind, default=option.default, help=text)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or Ctrl-C: 0. Returns 2 for a mistake of the caller, 1 if the server could not start."""
    given = _parser().parse_args(arguments)
    try:
        settings = Settings(**vars(given))
        token = settings.token()
        if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
            raise ValueError(f"the service needs more packages: {install_line('serve')}")
        if os.name != "posix":
            raise ValueError("the service runs on Linux and macOS")
        return _serve(settings, token)
    except (ValueError, OSError) as error:
        return fail(_NAME, 2, brief(error))
    except sqlite3.Error as error:
        return fail(_NAME, 1, f"{given.data}: the store cannot be opened ({error})")


def _serve(settings: Settings, token: str) -> int:
    import resource
    from pathlib import Path

    import uvicorn
    from filelock import FileLock, Timeout

    from . import logs
    from .api import create_app
    from .protocol import Protocol
    from .store import BALLAST

    logs.set_up(settings.log)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if 0 <= soft < most:  # 1024 is usual
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    Path(settings.data).mkdir(parents=True, exist_ok=True, mode=0o700)
    lock = FileLock(Path(settings.data) / "server.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(f"{settings.data} is in use by another server") from error
    with lock:
        for each in Path(settings.data).glob(f"*{BALLAST}*"):  # half ones too
            each.unlink()
        app = create_app(settings, token)

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                """Let event streams end and refuse new jobs, then stop; the exit status is 0."""
                app.state.service.stopping = True
                self.should_exit = True

        config = uvicorn.Config(
            app, host=settings.host, port=settings.port, http=Protocol, ws="none",
            log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=_GRACE, timeout_keep_alive=10, limit_concurrency=_CONNECTIONS,
            proxy_headers=bool(settings.proxy), forwarded_allow_ips=settings.proxy,
        )  # fmt: skip
        server = Server(config)
        with contextlib.suppress(SystemExit):  # of uvicorn, with a status of its own, where the port is taken
            server.run()
        if app.state.service.mistake:
            raise ValueError("no worker can start with these options: see above")
        return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
