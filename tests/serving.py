"""A real server in a process of its own, for the tests that kill it."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from PIL import Image

PATIENCE = 180  # seconds; only a server that is broken takes so long


def pixels(file: bytes) -> bytes:
    """What a picture shows, whatever manifest it carries."""
    return Image.open(io.BytesIO(file)).tobytes()


class Server:
    """`python -m engine.serve` on a free port of 127.0.0.1."""

    def __init__(self, data: Path, *options: str) -> None:
        self.data, self.options = data, options
        self._choose_port()
        self.log = data.parent / f"{data.name}.log"
        self.process: subprocess.Popen | None = None

    def _choose_port(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, ready=True, tries=3) -> "Server":
        words = ["--port", self.port, "--data", self.data, "--weights", "embedded", "--device", "cpu", *self.options]
        with self.log.open("a") as log:
            command = [sys.executable, "-m", "engine.serve", *map(str, words)]
            self.process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
        try:
            self.wait("/health/ready" if ready else "/health/live")
        except ConnectionRefusedError:  # somebody else has the port by now
            if tries == 1:
                raise
            self._choose_port()
            return self.start(ready, tries - 1)
        return self

    def wait(self, path: str) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                said = self.log.read_text()
                assert "address already in use" in "\n".join(said.splitlines()[-5:]), said
                raise ConnectionRefusedError
            try:
                return urllib.request.urlopen(self.url + path, timeout=5).close()
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"{path}: not in time\n{self.log.read_text()}")

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def bytes(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def finished(self, job: str, until=("succeeded", "failed", "cancelled")):
        """The job, once it is in one of the states."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            found = self.get(f"/v1/jobs/{job}")
            if found["state"] in until:
                return found
            time.sleep(0.05)
        raise AssertionError(f"{found}\n{self.log.read_text()}")

    def kill(self, everything=True) -> None:
        """SIGKILL, to the server alone or to its workers as well."""
        if everything:
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait()

    def terminate(self) -> tuple[int, float]:
        """SIGTERM: exit status and seconds."""
        start = time.monotonic()
        self.process.terminate()
        return self.process.wait(60), time.monotonic() - start

    def __enter__(self) -> "Server":
        try:
            return self.start()
        except BaseException:  # nobody calls __exit__
            self.__exit__()
            raise

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.kill()


def post(server: Server, content: bytes, style: bytes, options: dict, key: str | None = None) -> tuple[int, dict, dict]:
    """Status, body and headers of a new job."""
    boundary = "0123456789abcdef"
    parts = []
    for name, value in (("content", content), ("style", style), ("options", json.dumps(options).encode())):
        file = "" if name == "options" else f'; filename="{name}.png"\r\nContent-Type: image/png'
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts.append(head.encode() + value + b"\r\n")
    body = b"".join(parts) + f"--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    if key:
        headers["Idempotency-Key"] = key
    request = urllib.request.Request(server.url + "/v1/jobs", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.load(answer), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error), dict(error.headers)
