"""The options of the service. Standard library only, so that `--help` answers at once."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import DEVICES, PRECISIONS
from engine.export.commands import choice

_MAX_PIXELS = 89_478_485  # Pillow's own limit, which the engine keeps to


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of one server; each field is a command line option of the same name. Raises ValueError."""

    host: str = _option("127.0.0.1", "address to listen at; any but a loopback one needs a token")
    port: int = _option(8000, "port to listen at")
    proxy: str = _option("", "address of the reverse proxy whose X-Forwarded-For names the clients")
    data: str = _option("stylize-data", "folder of jobs and results, made if it is missing")
    keep: float = _option(24.0, "hours that a finished job is kept")
    token_file: str = _option("", "file whose first line is the bearer token (or set STYLIZE_TOKEN)")
    weights: str = _option("auto", "auto, embedded, imagenet or a file")
    device: str = _option("auto", "auto, cpu, onnxruntime, cudnn, cuda or tensorrt")
    precision: str = _option("auto", "auto, fp32, fp16, or bf16 on cpu, cudnn and tensorrt")
    workers: int = _option(1, "worker processes: one for each GPU; on a CPU they share the cores")
    queue: int = _option(64, "jobs that may wait; more are refused with 503")
    per_client: int = _option(16, "unfinished jobs of one address; more are refused with 429")
    max_bytes: int = _option(32 * 2**20, "bytes of one request")
    max_pixels: int = _option(40_000_000, "pixels of one uploaded picture")
    styles: int = _option(1000, "styles that may be stored")
    max_size: int = _option(2048, "largest `size` of a job")
    upload_seconds: float = _option(60.0, "seconds that a request may take to arrive")
    deadline: float = _option(3600.0, "seconds that a job may run, unless it asks for less")
    reserve: int = _option(256 * 2**20, "bytes that stay free on the disk; below, jobs are refused with 507")
    log: str = _option("text", "format of the log on stderr: text or json")

    def __post_init__(self) -> None:
        choice("device", self.device, DEVICES)
        choice("precision", self.precision, PRECISIONS)
        for name in ("workers", "queue", "per_client", "max_bytes", "max_pixels", "max_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: give a number from 1")
        for name in ("keep", "upload_seconds", "deadline"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)}: give a number above 0")
        for name in ("styles", "reserve"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: give a number from 0")
        if self.max_pixels > _MAX_PIXELS:
            raise ValueError(f"max_pixels {self.max_pixels}: Pillow decodes up to {_MAX_PIXELS}")
        if not 0 <= self.port < 65536:
            raise ValueError(f"port {self.port}: give a number from 0 to 65535")
        if self.proxy:
            ipaddress.ip_network(self.proxy)  # a name would never match, and `*` would trust everybody
        if self.log not in ("text", "json"):
            raise ValueError(f"log {self.log!r}: choose from text, json")

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    def token(self) -> str:
        """The bearer token, or an empty string if none is asked for. Raises ValueError if one is needed, OSError."""
        token = os.environ.get("STYLIZE_TOKEN", "").strip()  # a secret that was made with `echo` ends with a line
        if self.token_file:
            token = next(iter(Path(self.token_file).read_text().splitlines()), "").strip()
            if not token:
                raise ValueError(f"{self.token_file} holds no token")
        if not all("!" <= sign <= "~" for sign in token):
            raise ValueError("the token has to be of printable ASCII, without spaces: no other comes through a header")
        if not token and not self.loopback:
            raise ValueError(f"host {self.host} can be reached by others: set STYLIZE_TOKEN or give --token-file")
        return token


def environment() -> dict[str, str]:
    """That of a process of the server's, which need not know the token."""
    return {name: value for name, value in os.environ.items() if name != "STYLIZE_TOKEN"}


def is_loopback(host: str) -> bool:
    """Whether a host name or address is that of the machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
