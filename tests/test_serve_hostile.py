"""Requests that mean harm: made up by schemathesis from the OpenAPI document, and uploads of the wrong kind."""

import asyncio
import contextlib
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import Server, post

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")
import schemathesis
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from engine.serve import api, decoder, guard, problems, protocol
from engine.serve.settings import Settings

HOST = {"host": "localhost"}  # schemathesis takes another name for an application without a server
OPTIONS = ("{}", '{"size": 48, "iterations": 1, "scales": 1}', '{"size": 1e9}', "[", '{"init": "../x"}')


def picture(width=48, height=40, form="PNG", mode="RGB", **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    (Image.fromarray(noise) if width < 1000 else Image.new(mode, (width, height))).save(stream, form, **options)
    return stream.getvalue()


# Made up from the document.


def fuzz(schema, examples, jobs) -> Counter:
    """Numbers of answers by (operation, valid or not, status): each is what the document says, and none a 5xx."""
    seen = Counter()
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in GenerationMode if operation.body or operation.path_parameters else [GenerationMode.POSITIVE]:
            fuzz_one(operation, mode, examples, jobs, seen)
    return seen


def fuzz_one(operation, mode, examples, jobs, seen):
    """Of the valid requests some get what the document cannot tell: pictures, options, ids of jobs."""
    # For the document any text is a picture, and bytes are none.
    unknowing = [positive_data_acceptance, *([negative_data_rejection] if mode is GenerationMode.POSITIVE else [])]

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(operation.as_strategy(generation_mode=mode), st.booleans(), st.sampled_from(OPTIONS), st.sampled_from(jobs))
    def ask(case, real, options, job):
        if mode is GenerationMode.POSITIVE and real:
            if "job" in (case.path_parameters or {}):
                case.path_parameters["job"] = job
            if operation.path == "/v1/styles" and operation.body:
                case.body = {"style": picture()}
            if operation.path == "/v1/jobs":
                case.body = {"content": picture(), "style": [picture()], "options": options}
        answer = case.call(headers=HOST)
        seen[operation.label, mode.name, answer.status_code] += 1
        case.validate_response(answer, excluded_checks=unknowing)

    ask()


class Nobody:
    """A supervisor without workers."""

    mistake = False

    def __init__(self, store, settings):
        store.announce(0, "cpu", "embedded")

    def start(self):
        pass

    def stop(self):
        pass


def test_requests_made_up_from_the_document_meet_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(api, "Supervisor", Nobody)
    many = {"queue": 10**6, "per_client": 10**6, "styles": 10**6}
    app = api.create_app(Settings(data=str(tmp_path), reserve=0, **many))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HOST)
    logging.disable(logging.CRITICAL)
    try:
        seen = fuzz(schema, 6, ["0" * 32])
    finally:
        logging.disable(logging.NOTSET)
    assert max(status for *_, status in seen) < 500
    assert 403 not in {status for *_, status in seen}
    assert {label for label, *_ in seen} >= {"POST /v1/jobs", "POST /v1/styles", "GET /v1/jobs/{job}/events"}


# Decoders and slow clients, one by one.


def test_a_decoder_that_dies_or_hangs_is_replaced(monkeypatch):
    decoders = decoder.Decoders(max_pixels=10**6)
    try:
        assert decoders.check("content", picture(60, 50)) == (60, 50)
        for data, status in ((b"text", 415), (picture()[:99], 422), (picture(1200, 1200), 413)):
            with pytest.raises(problems.Problem) as refused:
                decoders.check("content", data)
            assert refused.value.status_code == status
        (process,) = decoders._all
        process.kill()
        process.wait()
        assert decoders.check("content", picture()) == (48, 40)
        monkeypatch.setattr(decoder, "_SECONDS", 0.2)
        for process in decoders._all:
            process.send_signal(signal.SIGSTOP)
        with pytest.raises(problems.Problem, match="too much time"):
            decoders.check("content", picture())
    finally:
        decoders.close()
    with pytest.raises(problems.Problem, match="stopping"):
        decoders.check("content", picture())


def test_a_decoder_that_cannot_be_started_is_no_fault_of_the_picture(monkeypatch):
    decoders = decoder.Decoders(max_pixels=10**6)
    try:
        (process,) = decoders._all
        process.kill()
        process.wait()
        with monkeypatch.context() as patch:
            patch.setattr(decoder.subprocess, "Popen", lambda *_, **__: os.open("/nowhere", os.O_RDONLY))
            with pytest.raises(problems.Problem) as refused:
                decoders.check("content", picture())
        assert (refused.value.status_code, refused.value.retry_after) == (503, 5)
        assert decoders.check("content", picture()) == (48, 40)
    finally:
        decoders.close()


def test_a_decoder_that_ends_before_it_is_ready_is_no_fault_of_the_picture(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(decoder.sys, "executable", shutil.which("false"))
        decoders = decoder.Decoders(max_pixels=10**6)
        try:
            for _ in range(2):
                with pytest.raises(problems.Problem) as refused:
                    decoders.check("content", picture())
                assert (refused.value.status_code, refused.value.retry_after) == (503, 5)
            patch.undo()
            assert decoders.check("content", picture()) == (48, 40)
        finally:
            decoders.close()


def test_a_picture_that_takes_more_memory_than_a_decoder_has_is_refused(monkeypatch):
    code = (
        "import pathlib, resource\n"
        "from engine.serve import decoder\n"
        "used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "decoder._ROOM = used + 2**23 - 24 * 4_000_000\n"
        "decoder.main(4_000_000)\n"
    )
    start = subprocess.Popen
    monkeypatch.setattr(decoder.subprocess, "Popen", lambda words, **more: start([words[0], "-c", code], **more))
    decoders = decoder.Decoders(max_pixels=4_000_000)
    try:
        assert decoders.check("content", picture()) == (48, 40)
        for _ in range(2):
            with pytest.raises(problems.Problem) as refused:
                decoders.check("content", picture(2000, 2000))
            assert refused.value.status_code == 422
            assert decoders.check("content", picture()) == (48, 40)
    finally:
        decoders.close()


@contextlib.contextmanager
def spoken(app):
    """An application behind the protocol of the service: its server, and its port."""
    config = uvicorn.Config(app, port=0, http=protocol.Protocol, lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def test_a_client_that_never_ends_its_headers_is_sent_away(monkeypatch):
    monkeypatch.setattr(protocol, "SECONDS", 0.5)

    async def app(scope, receive, send):
        await asyncio.sleep(0.7)  # an answer may take longer than a head
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    with spoken(app) as (_, port):
        for whole, part in ((b"", b""), (b"", b"GET / HT"), (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", b"GET / HT")):
            with socket.create_connection(("127.0.0.1", port), timeout=3) as client:
                client.sendall(whole)
                if whole:
                    assert client.recv(65536).startswith(b"HTTP/1.1 204")
                client.sendall(part)
                assert received(client) == b""


def test_a_client_that_does_not_read_is_sent_away_and_a_slow_one_is_not(monkeypatch):
    monkeypatch.setattr(protocol, "FLUSH", 0.5)

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % 2**23)]})
        pieces = {"/whole": 1}.get(scope["path"], 128)
        for i in range(pieces):
            await send({"type": "http.response.body", "body": bytes(2**23 // pieces), "more_body": i < pieces - 1})

    with spoken(app) as (server, port):
        # An answer that is over for the application; one whose connection is to be closed; requests behind each other.
        for path, more, number in ((b"whole", b"", 1), (b"whole", b"Connection: close\r\n", 1), (b"pieces", b"", 99)):
            with small_client(port) as client:
                client.sendall(b"GET /%s HTTP/1.1\r\nHost: a\r\n%s\r\n" % (path, more) * number)
                end = time.monotonic() + 5
                while time.monotonic() < end and not server.server_state.connections:
                    time.sleep(0.01)
                while time.monotonic() < end and server.server_state.connections:
                    time.sleep(0.01)
                assert not server.server_state.connections
        with small_client(port) as client:
            client.sendall(b"GET /pieces HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
            taken, start = 0, time.monotonic()
            while data := client.recv(2**17):
                taken += len(data)
                time.sleep(0.02 * len(data) / 2**17)
            assert taken > 2**23
            assert time.monotonic() - start > 1  # each piece in time, all of them not


def small_client(port):
    """A connection that holds little of what its client does not read."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    client.settimeout(5)
    client.connect(("127.0.0.1", port))
    return client


def received(client) -> bytes:
    """All that a server sends until it closes the connection."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while data := client.recv(65536):
            found += data
    return found


def test_uploads_beyond_the_limit_come_again(tmp_path, monkeypatch):
    app = api.create_app(Settings(data=str(tmp_path), reserve=0))
    client = TestClient(app, base_url="http://localhost")
    assert client.post("/v1/styles", files={"style": picture()}).status_code == 201
    monkeypatch.setattr(guard, "_UPLOADS", 0)
    refused = client.post("/v1/styles", files={"style": picture()})
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert client.get("/v1/styles").status_code == 200


# All at once, against a real server.


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + data + chunk(b"IEND", b"")


def corpus() -> dict[str, tuple[bytes, set[int]]]:
    """Uploads and the statuses that may answer them."""
    zeros = zlib.compress(bytes(2**27))  # 128 MiB in 128 kB
    good, taken, refused = picture(), {200, 201}, {413, 415, 422}
    found = {
        "bomb": (png_of(60_000, 60_000), {413}),
        "bomb of one row": (png_of(2**31 - 1, 1), {413}),
        "text bomb": (png_of(48, 40, chunk(b"zTXt", b"a\0\0" + zeros)), {422}),
        "profile bomb": (png_of(48, 40, chunk(b"iCCP", b"a\0\0" + zeros)), taken | {422}),
        "all the pixels there may be": (picture(6300, 6300), taken),
        "the slowest format": (picture(16_000, 2_400, "WEBP"), taken),
        "progressive": (picture(6300, 6300, "JPEG", progressive=True), taken),
        "four channels": (picture(6300, 6300, "TIFF", "CMYK", compression="tiff_lzw"), taken),
        "strips beyond the end": (picture(64, 64, "TIFF")[:300], refused),
        "picture and archive": (good + b"PK\x03\x04<script>alert(1)</script>", taken),
        "archive and picture": (b"PK\x03\x04" + good, {415}),
        "document and picture": (b"%PDF-1.7 " + good, {415}),
        "script": (b"GIF89a/*" + bytes(100) + b"*/=1;alert(1)", refused),
        "drawing": (b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>', {415}),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (r) file\n", {415}),
        "noise": (np.random.default_rng(1).bytes(2**20), {415}),
        "too many bytes": (good + bytes(2**25), {413}),
    }
    for form in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"):
        data = picture(form=form)
        for share in (0.02, 0.3, 0.9):
            found[f"{form} cut at {share}"] = data[: int(share * len(data))], refused | taken
    return found


NAMES = (
    "../../etc/passwd",
    "..\\..\\x",
    "/etc/passwd",
    "a\0.png",
    "a" * 5000,
    "",
    ".",
    "%2e%2e%2f",
    "x.png; name=options",
)

POST = b"POST /v1/styles HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
HEADS = {
    "huge header": GET + b"X: " + b"a" * 2**20 + b"\r\n\r\n",
    "many headers": GET + b"X: a\r\n" * 100_000 + b"\r\n",
    "huge path": b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "garbage": bytes(range(256)) * 100,
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    "smuggled": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "wrong chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nx",
    "negative length": POST + b"Content-Length: -1\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "traversal": b"GET /samples/../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    "upgrade": GET + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n",
}


def multipart(name: str, data: bytes) -> tuple[bytes, dict[str, str]]:
    head = f'--b\r\nContent-Disposition: form-data; name="style"; filename="{name}"\r\n\r\n'.encode()
    return head + data + b"\r\n--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"}


def style(server, name, data) -> int | None:
    """The status that a style is answered with; None for a closed connection."""
    request = urllib.request.Request(server.url + "/v1/styles", *multipart(name, data))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


PROBE = """
import http.client, json, sys, threading, time
port, job, found = int(sys.argv[1]), sys.argv[2], []
end = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
while not end.is_set():
    for path in ("/health/live", "/v1/jobs/" + job, "/health/ready"):
        start = time.perf_counter()
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        client.request("GET", path)
        status = client.getresponse().status
        client.close()
        found.append((time.perf_counter() - start, status, path))
    end.wait(0.02)
print(json.dumps(found))
"""


@contextlib.contextmanager
def probed(server, job, what):
    """Latencies of short requests, from another process, are printed and have to be short."""
    command = [sys.executable, "-c", PROBE, str(server.port), job]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield
        found = json.loads(process.communicate("")[0])
    assert {status for _, status, _ in found} == {200}
    times = sorted((1000 * seconds, path.partition("/v1/")[2] or path) for seconds, _, path in found)
    half, most = times[len(times) // 2][0], times[int(0.99 * len(times))][0]
    longest = ", ".join(f"{each:.0f} for {path[:13]}" for each, path in times[:-4:-1])
    print(f"{what}: {len(times)} short requests; ms: median {half:.1f}, 99 % {most:.1f}, longest {longest}")
    assert most < 100


def peaks(server) -> list[tuple[str, int]]:
    """(module, MiB at most so far) of the server and its decoders."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if folder.name.isdecimal() and os.getpgid(int(folder.name)) == server.process.pid:
                module = (folder / "cmdline").read_bytes().split(b"\0")[2].decode()
                peak = re.search(r"VmHWM:\s+(\d+)", (folder / "status").read_text())
                found.append((module, int(peak[1]) // 1024))
    return sorted(found)


@pytest.mark.slow
def test_harm_from_all_sides_is_answered_and_nobody_else_waits(tmp_path):
    small = picture()
    with Server(tmp_path / "data", "--queue", "100000", "--per-client", "100000", "--styles", "100000") as server:
        _, first, _ = post(server, small, small, {"size": 48, "iterations": 2, "scales": 1})
        server.finished(first["id"])
        with probed(server, first["id"], "idle"):
            time.sleep(3)

        schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
        with probed(server, first["id"], "requests of schemathesis"):
            seen = fuzz(schema, 60, [first["id"], "0" * 32])
        print(f"schemathesis: {sum(seen.values())} requests, statuses {sorted({status for *_, status in seen})}")
        assert max(status for *_, status in seen) < 500

        answers: list[tuple[str, int | None, set[int]]] = []
        uploads = corpus()

        def upload(turn):
            for i, (name, (data, wanted)) in enumerate(uploads.items()):
                file = NAMES[(i + turn) % len(NAMES)]
                answers.append((name, style(server, file, data), wanted if len(file) < 4096 else {400, 413}))

        def speak(head):
            with (
                contextlib.suppress(ConnectionError, TimeoutError),
                socket.create_connection(("127.0.0.1", server.port), timeout=15) as client,
            ):
                client.sendall(head)
                lines = re.findall(rb"^HTTP/1.1 (\d+)", received(client), re.M)
                answers.extend((head[:40].decode("latin-1"), int(line), set(range(200, 500))) for line in lines)

        with probed(server, first["id"], "hostile uploads of eight clients"):
            threads = [threading.Thread(target=upload, args=(turn,)) for turn in range(8)]
            threads += [threading.Thread(target=speak, args=(head,)) for head in HEADS.values()]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        wrong = [(name, status) for name, status, wanted in answers if status not in wanted]
        # A client that goes on sending what was refused may find the connection closed.
        assert {name for name, status in wrong} <= {"too many bytes"}, wrong
        assert all(status is None for _, status in wrong), wrong
        print(f"uploads: {len(answers)} answers, {dict(Counter(status for _, status, _ in answers))}")

        with probed(server, first["id"], "300 slow clients"):
            started = time.monotonic()
            slow = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(300)]
            for i, client in enumerate(slow):
                body = POST + b"Content-Length: 99\r\n\r\n"
                client.sendall(body if i < 40 else GET + b"X")
            for _ in range(4):
                time.sleep(1)
                for client in slow:
                    client.sendall(b":")
            for client in slow[40:]:
                assert received(client) == b""
            print(f"slow heads: closed after {time.monotonic() - started:.1f} s")
            for client in slow:
                client.close()
        found = peaks(server)
        print(f"peak memory in MiB: {found}")
        limits = {"engine.serve": 250, "engine.serve.decoder": 700, "engine.serve.worker": 2500}
        assert all(peak < limits[module] for module, peak in found)
        assert server.get(f"/v1/jobs/{first['id']}")["state"] == "succeeded"
    log = server.log.read_text()
    assert "Traceback" not in log
    own = r"[0-9a-f]{64}|(store\.sqlite|\.?server|\.?worker).*|(result|preview)\.png|content|style-\d"
    names = {path.name for path in server.data.rglob("*") if path.is_file()}
    assert [name for name in names if not re.fullmatch(own, name)] == []
