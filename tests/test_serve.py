"""The HTTP interface and the worker, each in this process: limits, refusals, and what a job becomes."""

import asyncio
import errno
import inspect
import io
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from serving import pixels

pytest.importorskip("fastapi")
import uvicorn
from fastapi.testclient import TestClient

from engine import Config, Step, checkpoint, replay
from engine.serve import __main__ as command
from engine.serve import api, decoder, guard, logs, problems, store, supervisor, worker
from engine.serve.settings import Settings

OPTIONS = {"size": 48, "iterations": 4, "scales": 1}


def png(array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def files(pictures):
    return {"content": png(pictures["content"]), "style": png(pictures["style"])}


def service(tmp_path, token="", **settings):
    """A client of an application without workers, and its store."""
    app = api.create_app(Settings(data=str(tmp_path / "data"), reserve=0, **settings), token)
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False), app.state.service.store


@pytest.fixture
def client(tmp_path):
    return service(tmp_path)


def post(client, files, options=OPTIONS, headers=None, **data):
    text = options if isinstance(options, str) else json.dumps(options)
    return client.post("/v1/jobs", files=files, data={"options": text, **data}, headers=headers)


def run(client_and_store, stylizer, stop=None):
    """Be the worker for one job."""
    data = client_and_store[1]
    worker.run(data, stylizer, data.claim(0), stop or threading.Event())


def problem(answer, status):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["title"]
    return body["detail"]


class Wrapped:
    """A stylizer that calls `act(iteration)` before each step is handed on."""

    def __init__(self, stylizer, act):
        self.stylizer, self.act = stylizer, act

    def __getattr__(self, name):
        return getattr(self.stylizer, name)

    def steps(self, *arguments, **options):
        return self._acting(self.stylizer.steps(*arguments, **options))

    def _acting(self, steps):
        for step in steps:
            self.act(step.iteration)
            yield step


# What a job becomes.


def test_a_job_gives_the_librarys_pixels(client, files, stylizer):
    answer = post(client[0], files)
    assert answer.status_code == 202
    job = answer.json()
    assert (job["state"], job["place"]) == ("queued", 0)
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    problem(client[0].get(job["image"]), 409)
    run(client, stylizer)
    done = client[0].get(answer.headers["location"]).json()
    assert (done["state"], done["iteration"], done["total"]) == ("succeeded", 4, 4)
    result = client[0].get(job["image"])
    assert result.headers["content-type"] == "image/png"
    config = Config(size=48, iterations=4, scales=1)
    assert pixels(result.content) == stylizer(files["content"], files["style"], config).image.tobytes()
    assert sorted(path.name for path in client[1].folder(job["id"]).iterdir()) == ["result.png"]


def test_a_result_carries_the_manifest_of_which_it_can_be_made_again(client, files, stylizer, tmp_path):
    job = post(client[0], files).json()
    run(client, stylizer)
    path = tmp_path / "result.png"
    path.write_bytes(client[0].get(job["image"]).content)
    record = replay.read(str(path))
    config, again = replay.inputs(record, tmp_path, [files["content"], files["style"]], "again.png")
    replay.check_engine(record, stylizer, config)
    assert stylizer(again.content, again.style, config).image.tobytes() == pixels(path.read_bytes())


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("image/webp", "WEBP"),
        ("image/jpeg;q=0.9, image/png;q=0.5", "JPEG"),
        ("text/html, image/*;q=0.1", "PNG"),
        ("image/*, image/png;q=0.5", "JPEG"),
        ("*/*;q=0.5, image/*;q=0.1, image/webp;q=0.2", "WEBP"),
        ("*/*", "PNG"),
    ],
)
def test_the_picture_comes_in_the_format_that_is_asked_for(client, files, stylizer, accept, form):
    job = post(client[0], files).json()
    run(client, stylizer)
    answer = client[0].get(job["image"], headers={"accept": accept})
    assert Image.open(io.BytesIO(answer.content)).format == form
    problem(client[0].get(job["image"], headers={"accept": "image/avif, image/png;q=0"}), 406)


def test_events_tell_progress_previews_and_the_end(client, files, stylizer, monkeypatch):
    monkeypatch.setattr(worker, "_REPORT", 0.0)
    monkeypatch.setattr(worker, "_SHARE", 0.0)
    job = post(client[0], files).json()
    run(client, stylizer)
    text = client[0].get(job["events"]).text
    events = re.findall(r"id: (\d+)\nevent: (\w+)\ndata: (.*)\n\n", text)
    assert [name for _, name, _ in events] == ["progress", "preview", "end"]
    losses = json.loads(events[0][2])["losses"]
    assert [iteration for iteration, _, _ in losses] == [1, 2, 3, 4]
    assert events[0][0] == "4"
    answer = client[0].get(job["events"], headers={"last-event-id": "3"})
    assert answer.headers["x-accel-buffering"] == "no"
    later = answer.text
    assert json.loads(re.search(r"data: (.*)", later)[1])["losses"] == losses[3:]
    monkeypatch.setattr(api, "_LOSSES", 2)  # those of a long run come in pieces
    pieces = re.findall(r"id: (\d+)\nevent: progress\ndata: (.*)\n\n", client[0].get(job["events"]).text)
    assert [number for number, _ in pieces] == ["2", "4", "4"]
    assert [loss for _, data in pieces for loss in json.loads(data)["losses"]] == losses
    assert client[0].app.state.service.streams == 0
    monkeypatch.setattr(api, "_STREAMS", 0)
    assert "event streams are open" in problem(client[0].get(job["events"]), 503)


def test_a_deadline_is_that_of_the_server_at_most(tmp_path, files):
    own = service(tmp_path, deadline=50.0)
    deadlines = [
        own[1].job(post(own[0], files, **given).json()["id"])["deadline"]
        for given in ({}, {"deadline": 7}, {"deadline": 1e6})
    ]
    assert deadlines == [50, 7, 50]


def test_size_original_is_limited_too(tmp_path, files):
    own = service(tmp_path, max_size=48)
    assert "size 56: this server paints up to 48" in problem(post(own[0], files, {"size": "original"}), 422)


def test_cancelling_stops_within_one_iteration_and_keeps_the_picture(client, files, stylizer):
    job = post(client[0], files, {**OPTIONS, "iterations": 50}).json()
    url = f"/v1/jobs/{job['id']}"
    run(client, Wrapped(stylizer, lambda i: i == 3 and client[0].delete(url)))
    done = client[0].get(url).json()
    assert (done["state"], done["iteration"]) == ("cancelled", 3)
    assert client[0].get(job["image"]).status_code == 200
    assert client[0].delete(url).json()["state"] == "cancelled"


def test_the_picture_so_far_is_the_librarys_at_that_iteration(client, files, stylizer, monkeypatch):
    now = 0
    monkeypatch.setattr(worker, "_PREVIEW", 2)
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now))  # each iteration takes 1
    job = post(client[0], files, {**OPTIONS, "iterations": 9}).json()
    config = Config(size=48, iterations=9, scales=1)
    own = [step.image.tobytes() for step in stylizer.steps(files["content"], files["style"], config)]
    assert len(set(own[:6])) == 6

    def act(iteration):
        nonlocal now
        now = iteration
        if iteration > 1:
            assert pixels(client[0].get(job["image"]).content) == own[(iteration - 2) // 2 * 2]
        if iteration == 6:
            client[0].delete(f"/v1/jobs/{job['id']}")

    run(client, Wrapped(stylizer, act))
    assert client[1].job(job["id"])["state"] == "cancelled"
    assert pixels(client[0].get(job["image"]).content) == own[5]


@pytest.mark.parametrize("damage", [False, True])
def test_a_job_that_was_stopped_goes_on_from_its_checkpoint(client, files, stylizer, damage):
    options = {"size": 72, "iterations": [3, 6], "scales": 2, "init": "noise"}
    job = post(client[0], files, options).json()
    stop, seen = threading.Event(), []

    def act(iteration):
        seen.append(iteration)
        if iteration == 5:
            stop.set()

    run(client, Wrapped(stylizer, act), stop)
    left = client[0].get(f"/v1/jobs/{job['id']}").json()
    assert (left["state"], left["iteration"]) == ("queued", 5)
    path = client[1].folder(job["id"]) / "checkpoint"
    if damage:
        path.write_bytes(path.read_bytes()[:-9])
    run(client, Wrapped(stylizer, seen.append))
    assert seen == [1, 2, 3, 4, 5, *range(1 if damage else 6, 10)]
    whole = stylizer(files["content"], files["style"], Config(**options))
    assert pixels(client[0].get(job["image"]).content) == whole.image.tobytes()
    record = replay.read(str(client[1].folder(job["id"]) / "result.png"))
    assert record["iterations"] == {"done": 9, "total": 9}
    assert [iteration for iteration, _ in record["losses"]][-1] == 9


def test_a_job_whose_worker_was_killed_goes_on_from_its_last_checkpoint(client, files, stylizer, monkeypatch):
    class Killed(BaseException):
        pass

    options = {**OPTIONS, "iterations": 15, "init": "noise"}
    job = post(client[0], files, options).json()
    seen = []

    def act(iteration):
        seen.append(iteration)
        if seen == list(range(1, 14)):
            raise Killed

    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: len(seen)))  # an iteration takes a second
    with pytest.raises(Killed):
        run(client, Wrapped(stylizer, act))
    client[1].unclaim(0, crashed=True)
    run(client, Wrapped(stylizer, act))
    assert seen == [*range(1, 14), *range(11, 16)]
    whole = stylizer(files["content"], files["style"], Config(**options))
    assert pixels(client[0].get(job["image"]).content) == whole.image.tobytes()


def test_what_a_checkpoint_is_behind_of_is_told_before(client, files, stylizer, monkeypatch):
    job = post(client[0], files).json()["id"]
    monkeypatch.setattr(worker, "_CHECKPOINT", 0.0)
    monkeypatch.setattr(worker, "_SHARE", 0.0)
    monkeypatch.setattr(worker, "_REPORT", 600.0)  # the first iteration only

    def act(iteration):
        if iteration == 4:
            assert [iteration for iteration, *_ in client[1].losses(job)] == [1, 2, 3]

    run(client, Wrapped(stylizer, act))
    assert client[1].job(job)["state"] == "succeeded"


def test_a_disk_that_is_full_for_a_moment_stops_no_job(client, files, stylizer, monkeypatch):
    job = post(client[0], files).json()
    for name in ("_CHECKPOINT", "_REPORT", "_PREVIEW", "_SHARE"):
        monkeypatch.setattr(worker, name, 0.0)
    written, progress = [], client[1].progress

    def write(path, data):
        written.append(path.name)
        if path.name != "result.png":
            raise OSError(errno.ENOSPC, "No space left on device", path)
        store.write(path, data)

    def save(tensors, path, *arguments):
        written.append("checkpoint")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    def report(*arguments):
        written.append("progress")
        if written.count("progress") < 3:
            raise store.sqlite3.OperationalError("database or disk is full")
        progress(*arguments)

    monkeypatch.setattr(worker, "write", write)
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    monkeypatch.setattr(client[1], "progress", report)
    run(client, stylizer)
    assert (written.count("checkpoint"), written.count("preview.png")) == (3, 4)
    done = client[0].get(f"/v1/jobs/{job['id']}").json()
    assert (done["state"], done["preview"]) == ("succeeded", 0)
    assert [iteration for iteration, *_ in client[1].losses(job["id"])] == [1, 2, 3, 4]


def test_the_reserve_of_the_disk_is_for_results(client, files, stylizer, monkeypatch, caplog):
    jobs = [post(client[0], files).json()["id"] for _ in range(2)]
    for name in ("_CHECKPOINT", "_PREVIEW", "_SHARE"):
        monkeypatch.setattr(worker, name, 0.0)
    written, stop = [], threading.Event()
    monkeypatch.setattr(worker, "write", lambda path, data: (written.append(path.name), store.write(path, data)))
    seal = checkpoint._sealed
    monkeypatch.setattr(checkpoint, "_sealed", lambda each: (written.append("checkpoint"), seal(each))[1])
    free = shutil.disk_usage(client[1].data).free
    for reserve in (free // 2, 2 * free):
        worker.run(client[1], stylizer, client[1].claim(0), stop, reserve)
    assert written[-2:] == ["result.png", "result.png"]
    assert (written.count("preview.png"), written.count("checkpoint")) == (4, 3)
    assert [client[1].job(job)["preview"] for job in jobs] == [4, 0]
    assert "no preview: [Errno 28]" in caplog.text
    assert "no checkpoint: [Errno 28]" in caplog.text


def test_a_worker_knows_what_is_reserved(client, monkeypatch):
    monkeypatch.setattr(supervisor.subprocess, "Popen", lambda command, stdin, env: command)
    words = supervisor.Supervisor(client[1], Settings(reserve=12345))._spawn(0)
    names = list(inspect.signature(worker.main).parameters)
    assert dict(zip(names, words[3:], strict=True))["reserve"] == "12345"


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_told(client, files, stylizer, monkeypatch, loss):
    """A GPU may meet one before it goes on in fp32."""
    monkeypatch.setattr(worker, "_REPORT", 0.0)
    monkeypatch.setattr(worker, "_SHARE", 0.0)
    own, job = Step.loss, post(client[0], files).json()["id"]
    monkeypatch.setattr(Step, "loss", property(lambda step: loss if step.iteration < 3 else own.fget(step)))

    def act(iteration):
        if iteration == 3:
            row = client[0].get(f"/v1/jobs/{job}").json()
            assert (row["iteration"], row["loss"]) == (2, None)

    run(client, Wrapped(stylizer, act))
    assert client[1].job(job)["state"] == "succeeded"
    assert [iteration for iteration, *_ in client[1].losses(job)] == [3, 4]


@pytest.mark.parametrize(("tries", "end"), [(0, "succeeded"), (1, "succeeded"), (4, "succeeded"), (10**9, "queued")])
def test_a_painted_picture_waits_for_room_on_the_disk(client, files, stylizer, monkeypatch, tries, end):
    job = post(client[0], files).json()["id"]
    for name, value in (("_CHECKPOINT", 0.0), ("_SHARE", 0.0), ("_ROOM", 0.01)):
        monkeypatch.setattr(worker, name, value)
    folder, stop, left, finish = client[1].folder(job), threading.Event(), [], client[1].finish

    def write(path, data):
        if path.name == "result.png" and len(left) < tries:
            left.append((folder / "checkpoint").exists())
            if len(left) == 9:
                stop.set()
            raise OSError(errno.ENOSPC, "No space left on device", path)
        store.write(path, data)

    def busy(*arguments):
        monkeypatch.setattr(client[1], "finish", locked)
        raise store.sqlite3.OperationalError("database or disk is full")

    def locked(*arguments):
        assert not (folder / "checkpoint").exists()
        monkeypatch.setattr(client[1], "finish", finish)
        raise store.sqlite3.OperationalError("database is locked")

    monkeypatch.setattr(worker, "write", write)
    monkeypatch.setattr(client[1], "finish", busy)
    run(client, stylizer, stop)
    assert left == [True, *[False] * 9][: min(tries, 10)]  # the checkpoint made room for it
    row = client[1].job(job)
    assert (row["state"], row["crashes"], row["iteration"]) == (end, 0, 4)
    kept = {path.name for path in folder.iterdir()}
    assert kept == ({"result.png"} if end == "succeeded" else {"content", "style-0", "preview.png"})


def test_a_worker_waits_for_a_store_that_is_full(client, files, stylizer, monkeypatch):
    job, stop, claim = post(client[0], files).json()["id"], threading.Event(), client[1].claim
    monkeypatch.setattr(worker, "_ROOM", 0.01)

    def full(number):
        monkeypatch.setattr(client[1], "claim", claim)
        raise store.sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(client[1], "claim", full)
    worker.work(client[1], Wrapped(stylizer, lambda i: i == 4 and stop.set()), 0, stop)
    assert client[1].job(job)["state"] == "succeeded"


def test_an_error_that_stays_with_the_device_ends_the_worker_and_others_do_not(client, files, stylizer):
    import torch

    if torch.cuda.is_available():
        pytest.skip("its device works")
    first, second = (post(client[0], files).json()["id"] for _ in range(2))

    def breaks(iteration):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    broken = Wrapped(stylizer, breaks)
    run(client, broken)
    assert client[1].job(first)["state"] == "failed"
    broken.device = "cudnn"
    with pytest.raises(RuntimeError, match="illegal memory"):
        run(client, broken)
    assert client[1].job(second)["state"] == "running"  # until the supervisor sees that its worker is gone


def test_what_a_dead_worker_ran_is_put_back_once_there_is_room(client, files, monkeypatch):
    post(client[0], files)
    client[1].claim(0)
    watch = supervisor.Supervisor(client[1], Settings())
    watch._workers[0] = SimpleNamespace(poll=lambda: -9, returncode=-9, stdin=None)

    def full(worker, crashed):
        raise store.sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(client[1], "unclaim", full)
        with pytest.raises(store.sqlite3.OperationalError):
            watch._look(0)
    watch._look(0)
    assert client[1].counts() == {"queued": 1}


def test_old_jobs_go_though_a_worker_cannot_be_looked_at(client, files, monkeypatch):
    job, tidied = post(client[0], files).json()["id"], threading.Event()
    client[0].delete(f"/v1/jobs/{job}")
    expire = client[1].expire
    monkeypatch.setattr(client[1], "expire", lambda before: (expire(before), tidied.set()))
    monkeypatch.setattr(supervisor, "_LOOK", 0.01)
    jump = 0.0

    def watch(keep):
        watching = supervisor.Supervisor(client[1], Settings(keep=keep))
        monkeypatch.setattr(watching, "_look", full)
        tidied.clear()
        watching.start()
        assert tidied.wait(10)
        watching.stop()

    def full(number):
        nonlocal jump
        jump = 10_000.0
        raise store.sqlite3.OperationalError("database or disk is full")

    clock = SimpleNamespace(
        monotonic=time.monotonic, time=lambda: time.time() + jump, clock_gettime=time.clock_gettime, CLOCK_MONOTONIC=1
    )
    monkeypatch.setattr(supervisor, "time", clock)
    watch(keep=1.0)  # hours: a clock that is set forward meanwhile removes nothing
    assert client[1].counts() == {"cancelled": 1}
    watch(keep=1e-9)
    assert client[1].counts() == {}


def test_a_worker_that_was_dead_before_the_server_stops_has_crashed(client, files, monkeypatch):
    job = post(client[0], files).json()["id"]
    client[1].claim(0)
    watch = supervisor.Supervisor(client[1], Settings())
    monkeypatch.setattr(watch, "_look", lambda number: None)
    watch._workers[0] = SimpleNamespace(poll=lambda: -9, stdin=io.BytesIO(), wait=lambda seconds: -9)
    watch.start()
    watch.stop()
    row = client[1].job(job)
    assert (row["state"], row["crashes"] > 0) == ("queued", True)


def test_a_worker_that_does_not_checkpoint_in_time_is_killed_and_has_not_crashed(client, files, monkeypatch):
    job = post(client[0], files).json()["id"]
    client[1].claim(0)
    killed, asked = [], []

    def wait(seconds=None):
        if not killed:
            asked.append(seconds)
            raise subprocess.TimeoutExpired("worker", seconds)

    watch = supervisor.Supervisor(client[1], Settings())
    monkeypatch.setattr(watch, "_look", lambda number: None)
    pipe = io.BytesIO()
    process = SimpleNamespace(poll=lambda: None, stdin=pipe, wait=wait, kill=lambda: killed.append(pipe.closed))
    watch._workers[0] = process
    watch.start()
    watch.stop()
    assert killed == [True]  # after it was asked to stop
    assert asked == [pytest.approx(supervisor.PATIENCE, abs=1)]
    row = client[1].job(job)
    assert (row["state"], row["crashes"]) == ("queued", 0)


def test_a_full_disk_keeps_no_worker_from_being_waited_for(client, monkeypatch):
    waited = []

    def full(worker, crashed):
        raise store.sqlite3.OperationalError("database or disk is full")

    watch = supervisor.Supervisor(client[1], Settings(workers=2))
    monkeypatch.setattr(watch, "_look", lambda number: None)
    monkeypatch.setattr(client[1], "unclaim", full)
    for _ in range(2):
        watch._workers[len(watch._workers)] = SimpleNamespace(poll=lambda: None, stdin=io.BytesIO(), wait=waited.append)
    watch.start()
    watch.stop()
    assert len(waited) == 2


def test_a_clock_that_is_set_forward_is_believed_after_a_while(monkeypatch):
    now, ahead = 0.0, 1000.0
    clock = SimpleNamespace(time=lambda: now + ahead, clock_gettime=lambda which: now, CLOCK_MONOTONIC=1)
    monkeypatch.setattr(supervisor, "time", clock)
    slow = supervisor._Clock(100.0)
    assert slow.now() == 1000
    now = 90.0
    assert slow.now() == 1090
    ahead = 10**9  # it was behind when the server started
    for now in (91.0, 101.0, 190.0):
        assert slow.now() == 1000 + now
    for now in (202.0, 250.0, 350.0):
        assert slow.now() == pytest.approx(10**9 + now)
    ahead = 5.0  # a clock that is set back counts at once
    assert slow.now() == 355


def test_what_takes_long_to_write_is_written_less_often(monkeypatch):
    now = 0.0
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now))
    every = worker._Every(5.0, first=False)

    def due(at, takes=0.0):
        nonlocal now
        now = at
        turns = 0
        for _ in every.due():
            now += takes
            turns += 1
        return bool(turns)

    assert not due(4.9)
    assert due(5.0, takes=2.0)
    assert not due(46.9)  # 7 and 20 times 2
    assert due(47.1, takes=0.01)
    assert not due(52.0)
    assert due(52.2)
    assert worker._Every(5.0, first=True)._next <= 0


def test_a_worker_that_hangs_is_killed(client, files, monkeypatch):
    now, killed = 0.0, []
    clock = SimpleNamespace(monotonic=lambda: now, time=time.time)
    monkeypatch.setattr(supervisor, "time", clock)
    watch = supervisor.Supervisor(client[1], Settings())
    watch._workers[0] = SimpleNamespace(poll=lambda: None, kill=lambda: killed.append(now))

    def look(at):
        nonlocal now
        now = at
        watch._look(0)

    look(0.0)
    look(1799.0)
    assert not killed
    look(1801.0)  # it never got ready
    assert killed == [1801.0]
    client[1].announce(0, "cpu", "embedded")
    look(10_000.0)  # it has nothing to do
    job = post(client[0], files).json()["id"]
    client[1].claim(0)
    look(20_000.0)
    client[1].progress(job, {"iteration": 1}, [])
    look(21_000.0)
    look(22_000.0)
    assert len(killed) == 1
    look(23_000.0)
    assert len(killed) == 2


def test_a_worker_without_a_server_ends_though_it_hangs(tmp_path):
    code = (
        "import time\n"
        "from engine import stylizer\n"
        "from engine.serve import worker\n"
        "stylizer.Stylizer = lambda *words, **options: print('here', flush=True) or time.sleep(600)\n"
        "worker.PATIENCE = 0.2\n"
        f"worker.main({str(tmp_path)!r}, '0', '1', 'embedded', 'cpu', 'auto', '0', 'text')\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == b"here\n"
        process.stdin.close()
        assert process.wait(60) == 1
        assert b"not stopped in time" in process.stderr.read()


@pytest.mark.parametrize(
    ("workers", "threads", "given"), [("1", None, {}), ("2", 3, {}), ("9", 1, {"CUPY_CACHE_DIR": "/a"})]
)
def test_a_worker_has_its_share_of_the_threads_and_writes_nothing_at_home(tmp_path, workers, threads, given):
    code = (
        "import os, torch\n"
        "from engine import stylizer\n"
        "from engine.serve import worker\n"
        "torch.set_num_threads(6)\n"
        "def make(*words, threads):\n"
        "    print(threads, os.environ['CUPY_CACHE_DIR'], flush=True)\n"
        "    raise ValueError('enough')\n"
        "stylizer.Stylizer = make\n"
        f"assert worker.main({str(tmp_path)!r}, '0', {workers!r}, '', '', '', '0', 'text') == worker.MISTAKE\n"
        "os._exit(0)\n"
    )
    own = {name: value for name, value in os.environ.items() if name != "CUPY_CACHE_DIR"}
    own |= {"STYLIZE_HOME": str(tmp_path), **given}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], env=own, **pipes) as process:
        assert process.stdout.readline() == f"{threads} {given.get('CUPY_CACHE_DIR', tmp_path / 'cupy')}\n"
        assert process.wait(60) == 0


@pytest.mark.parametrize(("status", "began"), [(supervisor.MISTAKE, False), (supervisor.MISTAKE, True), (1, False)])
def test_a_worker_that_nobody_could_be_ends_the_server_unless_one_has_worked(client, monkeypatch, status, began):
    sent = []
    monkeypatch.setattr(supervisor.os, "kill", lambda process, signal: sent.append(signal))
    watch = supervisor.Supervisor(client[1], Settings())
    if began:
        client[1].announce(0, "cpu", "embedded")
    watch._workers[0] = SimpleNamespace(poll=lambda: status, returncode=status, stdin=None)
    watch._look(0)
    assert watch.mistake == bool(sent) == (status == supervisor.MISTAKE and not began)


def test_a_worker_that_cannot_start_ends_no_server_while_another_may(client, monkeypatch):
    sent = []
    monkeypatch.setattr(supervisor.os, "kill", lambda process, signal: sent.append(signal))
    watch = supervisor.Supervisor(client[1], Settings(workers=2))
    for number in (1, 0):
        assert not sent
        dead = SimpleNamespace(poll=lambda: 2, returncode=supervisor.MISTAKE, stdin=None)
        watch._workers[number] = dead
        watch._look(number)
    assert watch.mistake
    assert len(sent) == 1


def test_a_token_is_what_comes_through_a_header(monkeypatch):
    monkeypatch.setenv("STYLIZE_TOKEN", "secret\n")
    assert Settings(host="0.0.0.0").token() == "secret"
    for token in ("schlüssel", "two words"):
        monkeypatch.setenv("STYLIZE_TOKEN", token)
        with pytest.raises(ValueError, match="printable ASCII"):
            Settings().token()


def test_a_file_with_the_token_counts_more_than_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("STYLIZE_TOKEN", "other")
    file = tmp_path / "token"
    settings = Settings(host="0.0.0.0", token_file=str(file))
    file.write_text(" secret \nsecond\n")
    assert settings.token() == "secret"
    for empty in ("", "\n", " \nsecond"):
        file.write_text(empty)
        with pytest.raises(ValueError, match="holds no token"):
            settings.token()


def test_neither_tokens_nor_pictures_are_logged(tmp_path, files, stylizer, caplog):
    caplog.set_level("DEBUG")
    both = service(tmp_path, token="s3cret-token")
    for token, status in (("s3cret-token", 202), ("wr0ng-token", 401)):
        headers = {"authorization": f"Bearer {token}"}
        assert post(both[0], files, headers=headers).status_code == status
        both[0].get(f"/v1/styles?token={token}", headers=headers)
    run(both, stylizer)
    records = [each for each in caplog.records if each.name.startswith("engine")]
    shown = [logs._Lines(as_json).format(each) for as_json in (True, False) for each in records]
    assert len(shown) > 8
    for hidden in ("s3cret", "wr0ng", "IDAT", "content.png", "style.png"):
        assert not [line for line in shown if hidden in line]


def test_a_loopback_address_is_one_for_the_server_and_its_guard(tmp_path, monkeypatch):
    monkeypatch.delenv("STYLIZE_TOKEN", raising=False)
    app = service(tmp_path)[0].app
    for host, answers in (("127.0.0.2", True), ("[::1]", True), ("localhost", True), ("127.example.com", False)):
        status = TestClient(app, base_url=f"http://{host}").get("/health/live").status_code
        assert status == (200 if answers else 403)
        assert Settings(host=host.strip("[]")).loopback == answers


def test_what_decodes_uploads_knows_no_token(monkeypatch):
    seen = []
    monkeypatch.setenv("STYLIZE_TOKEN", "secret")
    monkeypatch.setattr(decoder.subprocess, "Popen", lambda *given, env, **more: seen.append(env))
    decoder.Decoders(1)
    assert "STYLIZE_TOKEN" not in seen[0]
    assert seen[0]["PATH"]


def test_a_decoder_works_where_its_memory_cannot_be_limited(files, monkeypatch, capsys, caplog):
    def refused(*limits):
        raise ValueError("current limit exceeds maximum limit")

    asked = io.BytesIO(json.dumps(["content", len(files["content"])]).encode() + b"\n" + files["content"])
    monkeypatch.setattr(decoder.resource, "setrlimit", refused)
    monkeypatch.setattr(decoder.signal, "signal", lambda *_: None)
    monkeypatch.setattr(decoder.sys, "stdin", SimpleNamespace(buffer=asked))
    decoder.main(10**6)
    assert capsys.readouterr().out == 'ready\n{"width": 56, "height": 40}\n'
    assert "a decoder sets no limit to its memory" in caplog.text


@pytest.mark.parametrize(("given", "second"), [(None, "1"), ("", ""), ("4,7", "7"), ("4", "4")])
def test_each_worker_has_a_gpu_of_its_own_unless_there_is_to_be_none(client, monkeypatch, given, second):
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setenv("STYLIZE_TOKEN", "secret")
    monkeypatch.setattr(supervisor.subprocess, "Popen", lambda command, stdin, env: env)
    environment = supervisor.Supervisor(client[1], Settings(workers=2))._spawn(1)
    assert environment["CUDA_VISIBLE_DEVICES"] == second
    assert "STYLIZE_TOKEN" not in environment


def test_a_waiting_job_is_cancelled_at_once(client, files):
    job = post(client[0], files).json()
    assert client[0].delete(f"/v1/jobs/{job['id']}").json()["state"] == "cancelled"
    assert client[1].claim(0) is None
    assert not list(client[1].folder(job["id"]).iterdir())
    answer = client[0].get(job["image"])
    problem(answer, 404)
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("down", ["worker", "server"])
def test_a_job_that_was_asked_to_stop_does_not_come_back(client, files, down):
    job, other = (post(client[0], files).json() for _ in range(2))
    client[1].claim(0)
    client[1].claim(1)
    client[0].delete(f"/v1/jobs/{job['id']}")
    if down == "worker":
        client[1].unclaim(0, crashed=True)
        client[1].unclaim(1, crashed=True)
    else:
        client[1].recover()
    end = client[0].get(f"/v1/jobs/{job['id']}").json()
    assert (end["state"], end["reason"], end["finished"] is None) == ("cancelled", None, False)
    assert not list(client[1].folder(job["id"]).iterdir())
    assert client[1].claim(0)["id"] == other["id"]


def test_a_job_that_breaks_says_why_and_hurts_no_other(client, files, stylizer):
    jobs = [post(client[0], files).json() for _ in range(4)]

    def breaks(iteration):
        raise FloatingPointError("a loss that is\nnot finite")

    run(client, Wrapped(stylizer, breaks))
    client[1].progress(jobs[1]["id"], {"deadline": 1e-9}, [])
    (client[1].folder(jobs[2]["id"]) / "style-0").unlink()
    for _ in range(3):
        run(client, stylizer)
    ends = [client[0].get(f"/v1/jobs/{job['id']}").json() for job in jobs]
    assert [end["state"] for end in ends] == ["failed", "failed", "failed", "succeeded"]
    assert ends[0]["reason"] == "a loss that is not finite"
    assert "deadline" in ends[1]["reason"]
    assert "read or write a file" in ends[2]["reason"]
    assert "style-0" not in ends[2]["reason"]


def test_the_deadline_spares_a_picture_that_is_done(client, files, stylizer):
    job = post(client[0], files, {**OPTIONS, "iterations": 1}, deadline=1e-9).json()
    run(client, stylizer)
    assert client[0].get(f"/v1/jobs/{job['id']}").json()["state"] == "succeeded"


def test_a_job_in_which_the_worker_dies_twice_is_given_up(client, files):
    job = post(client[0], files).json()
    (client[1].folder(job["id"]) / "preview.png").write_bytes(b"x")
    for _ in range(2):
        assert client[1].claim(0)["id"] == job["id"]
        client[1].unclaim(0, crashed=True)
    assert [path.name for path in client[1].folder(job["id"]).iterdir()] == ["preview.png"]
    end = client[0].get(f"/v1/jobs/{job['id']}").json()
    assert (end["state"], end["reason"]) == ("failed", "the worker died twice in this job")


def test_a_job_with_which_the_server_goes_down_again_and_again_is_given_up(client, files):
    job, other = (post(client[0], files).json()["id"] for _ in range(2))
    for _ in range(20):
        assert client[1].claim(0)["id"] == job
        client[1].recover()
    assert client[1].job(job)["reason"] == "the server went down again and again in this job"
    assert not list(client[1].folder(job).iterdir())
    assert client[1].claim(0)["id"] == other


def test_jobs_go_by_priority_then_by_turns_of_the_clients(client, files):
    ids = [post(client[0], files, priority=p).json()["id"] for p in (0, 0, 5, 0)]
    client[1].progress(ids[3], {"client": "another"}, [])
    assert client[0].get(f"/v1/jobs/{ids[1]}").json()["place"] == 3
    order = [client[1].claim(0)["id"] for _ in range(4)]
    assert order == [ids[2], ids[3], ids[0], ids[1]]


def test_the_places_of_waiting_jobs_are_the_order_in_which_they_are_taken(tmp_path):
    jobs, dice = store.Store(tmp_path), random.Random(0)
    row = {"key": None, "fingerprint": "", "options": "{}", "styles": 0, "deadline": 1}

    def add(number):
        for _ in range(number):
            own = {"id": dice.randbytes(16).hex(), "client": dice.choice("aabc"), "priority": dice.choice((0, 0, 1, 5))}
            jobs.add(row | own, b"", [], (99, 99))

    add(8)
    for _ in range(5):
        jobs.claim(0)
    jobs.unclaim(0, crashed=False)  # these go before the others of their priority
    add(12)
    waiting = jobs._rows("SELECT * FROM jobs")
    while waiting:
        order = sorted(waiting, key=jobs.place)
        assert [jobs.place(job) for job in order] == list(range(len(waiting)))
        assert order.pop(0)["id"] == jobs.claim(0)["id"]
        waiting = order
    jobs.close()


def test_results_are_kept_and_then_removed(client, files, stylizer):
    job = post(client[0], files).json()
    run(client, stylizer)
    finished = client[1].job(job["id"])["finished"]
    assert client[1].expire(finished - 1) == 0
    assert client[1].expire(finished + 1) == 1
    problem(client[0].get(f"/v1/jobs/{job['id']}"), 404)
    assert not client[1].folder(job["id"]).exists()


def test_on_a_full_disk_what_is_overdue_makes_room(client, files, monkeypatch):
    """For the row's removal; once it is there, some is set aside, without which no server could start."""
    job = post(client[0], files).json()["id"]
    client[0].delete(f"/v1/jobs/{job}")
    begin = client[1]._write

    def full():
        if client[1].folder(job).exists():
            raise store.sqlite3.OperationalError("database or disk is full")
        return begin()

    with monkeypatch.context() as patch:
        patch.setattr(client[1], "_write", full)
        patch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
        assert client[1].expire(time.time() + 1) == 1
    assert client[1].counts() == {}
    assert not (client[1].data / store.BALLAST).exists()
    client[1].expire(0)
    assert (client[1].data / store.BALLAST).stat().st_size == store._BALLAST


def test_what_was_set_aside_is_room_for_a_start(tmp_path, monkeypatch):
    (tmp_path / store.BALLAST).write_bytes(b"x")
    opened = []

    def open_store(folder):
        opened.append((tmp_path / store.BALLAST).exists())
        raise store.sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(api, "Store", open_store)
    monkeypatch.setattr(logs, "set_up", lambda form: None)
    assert command.main(["--data", str(tmp_path)]) == 1
    assert opened == [False]


def test_what_a_dead_worker_had_half_written_is_swept(client, files):
    jobs = [post(client[0], files).json()["id"] for _ in range(2)]
    halves = [client[1].folder(job) / ".checkpoint-1-2" for job in jobs]
    for number, half in enumerate(halves):
        client[1].claim(number)
        half.write_bytes(b"x")
    client[1].unclaim(0, crashed=True)
    assert [half.exists() for half in halves] == [False, True]  # the other one is at work


def test_what_a_kill_left_half_done_is_swept(client, files):
    job = post(client[0], files).json()
    client[1].claim(0)
    (client[1].data / "jobs" / "orphan").mkdir()
    (client[1].data / "jobs" / "orphan" / "content").write_bytes(b"x")
    (client[1].folder(job["id"]) / ".preview.png-1-2").write_bytes(b"x")
    (client[1].data / "styles" / "orphan").write_bytes(b"x")
    done = post(client[0], files).json()["id"]
    for name in ("result.png", "preview.png", "checkpoint"):
        (client[1].folder(done) / name).write_bytes(b"x")
    client[1].progress(done, {"state": "succeeded", "finished": 1.0}, [])  # killed before it was tidied
    client[1].recover()
    assert [path.name for path in client[1].folder(done).iterdir()] == ["result.png"]
    assert {path.name for path in (client[1].data / "jobs").iterdir()} == {job["id"], done}
    assert sorted(path.name for path in client[1].folder(job["id"]).iterdir()) == ["content", "style-0"]
    assert not list((client[1].data / "styles").iterdir())
    assert client[1].job(job["id"])["state"] == "queued"


def test_styles_are_stored_once_and_outlive_their_removal_in_a_job(client, files, stylizer):
    style = {"style": files["style"]}
    first, again = (client[0].post("/v1/styles", files=style) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    name = first.json()["id"]
    assert [row["id"] for row in client[0].get("/v1/styles").json()] == [name]
    job = post(client[0], {"content": files["content"]}, style_id=name).json()
    assert client[0].delete(f"/v1/styles/{name}").status_code == 204
    problem(client[0].delete(f"/v1/styles/{name}"), 404)
    problem(post(client[0], {"content": files["content"]}, style_id=name), 404)
    run(client, stylizer)
    assert client[0].get(f"/v1/jobs/{job['id']}").json()["state"] == "succeeded"


def test_a_style_is_copied_where_there_are_no_links(client, files, monkeypatch):
    name = client[0].post("/v1/styles", files={"style": files["style"]}).json()["id"]

    def refused(source, target):
        raise PermissionError(errno.EPERM, "Operation not permitted", source)

    monkeypatch.setattr(store.os, "link", refused)
    job = post(client[0], {"content": files["content"]}, style_id=name).json()
    assert (client[1].folder(job["id"]) / "style-0").read_bytes() == files["style"]


def test_a_style_that_is_stored_and_removed_at_once_is_there_in_full_or_not_at_all(client, files, monkeypatch):
    name = client[0].post("/v1/styles", files={"style": files["style"]}).json()["id"]
    removal = threading.Thread(target=client[1].remove_style, args=(name,))

    def write(path, data):
        half(path, data)
        removal.start()
        removal.join(0.2)

    half = store.write
    monkeypatch.setattr(store, "write", write)
    client[1].add_style(name, (36, 44), files["style"])
    removal.join()
    assert [row["id"] for row in client[1].styles()] == [path.name for path in (client[1].data / "styles").iterdir()]


def test_a_stored_style_is_found_though_no_more_are_taken(tmp_path, files):
    client, _ = service(tmp_path, styles=1)
    assert client.post("/v1/styles", files={"style": files["style"]}).status_code == 201
    assert client.post("/v1/styles", files={"style": files["style"]}).status_code == 200
    problem(client.post("/v1/styles", files={"style": files["content"]}), 503)


# What is refused.


def bomb() -> bytes:
    """A PNG of 60000 x 60000 pixels in a few bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


HOSTILE = {
    "empty": (lambda good: b"", 422),
    "text": (lambda good: b"hello", 415),
    "svg": (lambda good: b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>', 415),
    "postscript": (lambda good: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 415),
    "pdf": (lambda good: b"%PDF-1.7 " + good, 415),
    "zip": (lambda good: b"PK\x03\x04" + good, 415),
    "truncated": (lambda good: good[: len(good) // 2], 422),
    "header only": (lambda good: good[:20], 422),
    "bomb": (lambda good: bomb(), 413),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("field", ["content", "style"])
def test_hostile_pictures_are_refused_before_they_cost_anything(client, files, kind, field):
    make, status = HOSTILE[kind]
    problem(post(client[0], {**files, field: make(files[field])}), status)
    assert not list((client[1].data / "jobs").iterdir())
    assert client[0].get("/health/live").status_code == 200


def test_a_picture_with_something_behind_it_is_only_a_picture(client, files):
    polyglot = files["content"] + b"PK\x03\x04<script>alert(1)</script>"
    answer = post(client[0], {**files, "content": ("../../etc/passwd\x00.html", polyglot, "text/html")})
    assert answer.status_code == 202
    names = {path.name for path in client[1].data.rglob("*") if path.is_file()} - {"store.sqlite"}
    assert {name for name in names if not name.startswith("store.")} == {"content", "style-0"}


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ("{", 400, "not JSON"),
        ("[" * 100_000, 400, "not JSON"),
        ("[]", 422, "object"),
        ({"sise": 64}, 422, "did you mean size"),
        ({"size": 31}, 422, "from 32"),
        ({"size": "64"}, 422, "give original or a number"),
        ({"size": 4096}, 422, "size 4096: this server paints up to 2048"),
        ({"style_size": 4096}, 422, "style size 4096: this server paints up to 2048"),
        ({"style_scale": 64}, 422, "style size 3"),
        ({"style_scale": [1, 2]}, 422, "style_scale has 2 numbers, there are 1 styles"),
        ({"style_weight": -1}, 422, "negative"),
        ('{"style_weight": NaN}', 422, "finite"),
        ('{"style_weight": 1e999}', 422, "finite"),
        ({"style_layers": ["relu9_1"]}, 422, "did you mean"),
        ({"style_layers": {"relu1_1": 1}}, 422, "style_layers"),
        ({"init": "/etc/passwd"}, 422, "init"),
        ({"init": "passwd"}, 422, "choose from content, noise"),
        ({"pooling": "../max"}, 422, "pooling"),
        ({"iterations": [1, 2, 3]}, 422, "iterations"),
        ({"style_blend": [1, 1]}, 422, "there are 1 styles"),
    ],
)
def test_options_are_checked_with_the_line_of_config(client, files, options, status, said):
    assert said in problem(post(client[0], files, options), status)


def test_other_fields_are_refused(client, files):
    """What is meant by them would be left out."""
    assert "field 'mask' is unknown" in problem(post(client[0], {**files, "mask": files["content"]}), 422)
    assert "did you mean options?" in problem(post(client[0], files, option="{}"), 422)
    assert "choose from style" in problem(client[0].post("/v1/styles", files=files), 422)


@pytest.mark.parametrize("name", ["5" * 63, "../x", "F" * 64, "5" * 64 + "\n", "+2AA-"])
def test_the_id_of_a_style_is_checked(client, files, name):
    """In UTF-7, the last one is half a character, which no database takes."""
    body = b"".join(
        b'--b\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % given
        for given in ((b"content", b'; filename="a"', files["content"]), (b"style_id", b"", name.encode()))
    )
    head = {"content-type": "multipart/form-data; boundary=b; charset=utf-7"}
    answer = client[0].post("/v1/jobs", content=body + b"--b--\r\n", headers=head)
    assert "style_id" in problem(answer, 422)


def test_a_missing_or_doubled_part_is_named(client, files):
    assert "content" in problem(client[0].post("/v1/jobs", files={"style": files["style"]}), 422)
    assert "style" in problem(client[0].post("/v1/jobs", files={"content": files["content"]}), 422)
    text = problem(client[0].post("/v1/jobs", data={"content": "text"}), 422)
    assert text == "content: send a file, as curl's -F NAME=@FILE does"
    problem(client[0].post("/v1/jobs", content=b"x", headers={"content-type": "multipart/form-data"}), 400)
    problem(post(client[0], files, priority=99), 422)
    assert "at most 8" in problem(
        post(client[0], [("content", files["content"]), *[("style", files["style"])] * 9]), 422
    )


def test_a_style_as_thin_as_a_thread_is_refused(client, files):
    threads = [png(np.zeros((1, length, 3), np.uint8)) for length in (64, 65)]
    stored = [client[0].post("/v1/styles", files={"style": thread}).json()["id"] for thread in threads]
    assert "crop it" in problem(post(client[0], {**files, "style": threads[1]}), 422)
    assert "crop it" in problem(post(client[0], files, style_id=stored[1]), 422)
    assert post(client[0], {**files, "style": threads[0]}, style_id=stored[0]).status_code == 202


def test_a_key_gives_the_same_job_and_refuses_another_request(client, files):
    key = {"idempotency-key": "a"}
    first, again = (post(client[0], files, headers=key) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    assert client[1].counts() == {"queued": 1}
    problem(post(client[0], files, {"size": 64}, headers=key), 409)
    assert post(client[0], files, headers={"idempotency-key": "b"}).json()["id"] != first.json()["id"]
    assert len({post(client[0], files, headers={"idempotency-key": ""}).json()["id"] for _ in range(2)}) == 2


def test_a_key_of_another_client_gives_another_job(client, files):
    others = TestClient(client[0].app, base_url="http://localhost", client=("192.0.2.1", 1))
    key = {"idempotency-key": "a"}
    first, other = (post(each, files, headers=key) for each in (client[0], others))
    assert (first.status_code, other.status_code) == (202, 202)
    assert first.json()["id"] != other.json()["id"]
    assert post(others, files, {"size": 64}, headers={"idempotency-key": "b"}).status_code == 202
    assert post(client[0], files, headers={"idempotency-key": "b"}).status_code == 202  # which is no conflict
    assert client[1].counts() == {"queued": 4}


def test_a_key_gives_its_job_whatever_has_changed_since(tmp_path, files):
    client, _ = service(tmp_path)
    key, content = {"idempotency-key": "a"}, {"content": files["content"]}
    name = client.post("/v1/styles", files={"style": files["style"]}).json()["id"]
    job = post(client, content, headers=key, style_id=name).json()["id"]
    client.delete(f"/v1/styles/{name}")
    client, _ = service(tmp_path, deadline=5.0, queue=1)  # started again
    client.app.state.service.stopping = True
    again = post(client, content, headers=key, style_id=name)
    assert (again.status_code, again.json()["id"]) == (202, job)
    problem(post(client, content, headers=key, style_id=name, deadline=2), 409)
    problem(post(client, files), 503)


@pytest.mark.parametrize("room", [1, 9])
def test_one_key_at_the_same_moment_makes_one_job(tmp_path, files, room):
    client, answers = service(tmp_path, queue=room, per_client=room), []
    threads = [
        threading.Thread(target=lambda: answers.append(post(client[0], files, headers={"idempotency-key": "a"})))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(list((client[1].data / "jobs").iterdir())) == 1


def test_a_full_queue_says_when_to_come_again(tmp_path, files):
    both = service(tmp_path, queue=2, per_client=2)
    for _ in range(2):
        assert post(both[0], files).status_code == 202
    answer = post(both[0], files)
    problem(answer, 429)
    assert int(answer.headers["retry-after"]) >= 1
    for row in both[1]._rows("SELECT id FROM jobs"):
        both[1].progress(row["id"], {"client": "another"}, [])
    answer = post(both[0], files)
    problem(answer, 503)
    assert int(answer.headers["retry-after"]) >= 1


def test_a_full_disk_is_507_and_not_ready(tmp_path, files, monkeypatch):
    both = service(tmp_path)

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", full)
        problem(post(both[0], files), 507)
    assert not list((both[1].data / "jobs").iterdir())
    monkeypatch.setattr(api.shutil, "disk_usage", lambda path: SimpleNamespace(free=-1))
    problem(post(both[0], files), 507)
    problem(both[0].get("/health/ready"), 507)


def test_an_upload_that_finds_no_room_for_its_file_is_507(client, files, monkeypatch):
    async def full(parser):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("starlette.formparsers.MultiPartParser.parse", full)
    problem(post(client[0], files), 507)


def test_uploads_that_wait_for_long_come_again_and_hold_up_no_picture(client, files, monkeypatch):
    job = post(client[0], files).json()
    (client[1].folder(job["id"]) / "preview.png").write_bytes(files["content"])
    monkeypatch.setattr(api, "_WAIT", 0.1)
    shared, over = client[0].app.state.service, threading.Event()
    for _ in range(2 * api.DECODERS):
        shared.turns.submit(over.wait)
    answer = post(client[0], files)
    painted = client[0].get(job["image"], headers={"accept": "image/jpeg"})
    over.set()
    problem(answer, 503)
    assert answer.headers["retry-after"] == "5"
    assert painted.status_code == 200


def test_limits_of_bytes_and_pixels(tmp_path, files):
    both = service(tmp_path, max_bytes=len(files["content"]) + 5000, max_pixels=40 * 56)
    assert post(both[0], {"content": files["content"], "style": files["content"]}).status_code == 202
    problem(post(service(tmp_path, max_pixels=40 * 56 - 1)[0], files), 413)
    noise = png(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8))
    problem(post(both[0], {**files, "style": noise}), 413)

    def chunks():
        yield from [b"x" * 1000] * 100

    problem(
        both[0].post("/v1/jobs", content=chunks(), headers={"content-type": "multipart/form-data; boundary=b"}), 413
    )


def test_an_upload_that_takes_too_long_is_given_up(files):
    sent = []

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass

    async def receive():
        await asyncio.sleep(0.03)
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/jobs", "headers": [(b"host", b"localhost")]}
    asyncio.run(guard.Guard(app, Settings(upload_seconds=0.1), "", problems.Problem.response)(scope, receive, send))
    assert sent[0]["status"] == 408


def test_the_page_starts_from_the_default_options(tmp_path):
    client, _ = service(tmp_path)
    page = client.get("/").text
    (script,) = re.findall(r'src="([^"]+page\.js)"', page)
    (weight,) = re.findall(r"style_weight: (\d+) \*", client.get(script).text)
    (iterations,) = re.findall(r'name="iterations" value="(\d+)"', page)
    (size,) = re.findall(r'<option value="(\d+)" selected>', page)
    default = Config()
    assert (int(weight), int(iterations), int(size)) == (default.style_weight, default.iterations, default.size)


# Who may ask.


def test_the_token_is_asked_for_everything_but_the_page_and_health(tmp_path, files):
    client, _ = service(tmp_path, token="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
        answer = client.get("/metrics", headers=headers)
        problem(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    problem(post(client, files), 401)
    assert client.get("/").status_code == client.get("/health/live").status_code == 200
    assert client.get("/metrics", headers={"authorization": "Bearer secret"}).status_code == 200
    assert post(client, files, headers={"authorization": "Bearer secret"}).status_code == 202


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"host": "evil.example"},
        {"host": "["},
    ],
)
def test_other_sites_and_names_are_not_served(client, headers):
    problem(client[0].get("/v1/styles", headers=headers), 403)


def test_every_refusal_is_counted_once(tmp_path, files, monkeypatch):
    client, _ = service(tmp_path, token="secret", max_bytes=1000)
    token = {"authorization": "Bearer secret"}
    form = {**token, "content-type": "multipart/form-data; boundary=b"}
    client.get("/v1/styles")
    client.get("/v1/styles", headers={**token, "sec-fetch-site": "cross-site"})
    client.get("/nothing", headers=token)
    client.post("/v1/styles", content=b"x" * 2000, headers=form)
    client.post("/v1/jobs", content=iter([b"x" * 600] * 3), headers=form)
    with monkeypatch.context() as patch:
        patch.setattr(guard, "_UPLOADS", 0)
        client.post("/v1/styles", headers=form)
    text = client.get("/metrics", headers=token).text
    found = dict(re.findall(r'stylize_rejected_total{status="(\d+)"} (.*)', text))
    assert found == {"401": "1.0", "403": "1.0", "404": "1.0", "413": "2.0", "503": "1.0"}


@pytest.mark.parametrize(("proxy", "clients"), [("", {"10.0.0.9"}), ("10.0.0.9", {"192.0.2.1", "192.0.2.2"})])
def test_clients_behind_a_proxy_are_told_apart(tmp_path, files, monkeypatch, proxy, clients):
    def ask(server):
        server.config.load()
        client = TestClient(server.config.loaded_app, base_url="http://localhost", client=("10.0.0.9", 1))
        for own in ("192.0.2.1", "192.0.2.2"):
            assert post(client, files, headers={"x-forwarded-for": f"192.0.2.9, {own}"}).status_code == 202

    monkeypatch.setattr(uvicorn.Server, "run", ask)
    monkeypatch.setattr(logs, "set_up", lambda form: None)
    command.main(["--data", str(tmp_path), "--proxy", proxy, "--reserve", "0"])
    jobs = store.Store(tmp_path)
    assert {row["client"] for row in jobs._rows("SELECT client FROM jobs")} == clients
    jobs.close()


def test_a_store_that_is_none_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(logs, "set_up", lambda form: None)
    (tmp_path / "store.sqlite").write_bytes(b"something else" * 100)
    assert command.main(["--data", str(tmp_path)]) == 1
    assert "the store cannot be opened (file is not a database)" in capsys.readouterr().err


def test_a_server_may_open_as_many_files_as_it_has_connections(tmp_path, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: None)
    monkeypatch.setattr(logs, "set_up", lambda form: None)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
    try:
        command.main(["--data", str(tmp_path)])
        most = 4096 if before[1] == resource.RLIM_INFINITY else min(4096, before[1])
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_line_of_the_log_is_one_line_whatever_a_client_sends(as_json):
    record = logging.makeLogRecord({"msg": "request\n%s", "args": ("a",), "levelname": "INFO"})
    record.path, record.status = "/a\n2026 error \x1b[2J\u2028", 404
    line = logs._Lines(as_json).format(record)
    assert line.isprintable()
    assert "request a" in line
    assert r'"/a\n2026 error \u001b[2J\u2028"' in line
    if not as_json:
        assert line.endswith(" status=404")


def test_head_is_answered_where_get_is(client, files):
    job = post(client[0], files).json()
    (client[1].folder(job["id"]) / "preview.png").write_bytes(files["content"])
    for path in ("/", "/health/live", "/metrics", job["image"], f"/v1/jobs/{job['id']}"):
        head, whole = client[0].head(path), client[0].get(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.content))
    assert client[0].head("/nothing").status_code == 404
    assert client[0].head(job["events"]).status_code == 405


@pytest.mark.parametrize("path", ["/", "/v1/styles", "/nothing", "/v1/jobs/..%2f..%2fetc", "/samples/..%2f__init__.py"])
def test_every_answer_is_guarded(client, path):
    answer = client[0].get(path)
    assert answer.status_code < 500
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert len(answer.headers["x-request-id"]) == 16
    assert "access-control-allow-origin" not in answer.headers
    if answer.status_code >= 400:
        problem(answer, answer.status_code)


def test_nothing_that_breaks_is_told_to_the_client(client, files, monkeypatch):
    monkeypatch.setattr(store.Store, "styles", lambda self: 1 / 0)
    assert "ZeroDivision" not in problem(client[0].get("/v1/styles"), 500)


def test_health_and_metrics(client, files, stylizer):
    problem(client[0].get("/health/ready"), 503)
    client[1].announce(0, "cpu", "embedded")
    assert client[0].get("/health/ready").json()["workers"] == [{"device": "cpu", "weights": "embedded"}]
    post(client[0], files)
    run(client, stylizer)
    post(client[0], files)
    text = client[0].get("/metrics").text
    assert "stylize_queue_depth 1.0" in text
    assert 'stylize_jobs_finished_total{state="succeeded"} 1.0' in text
    assert 'stylize_workers{device="cpu",weights="embedded"} 1.0' in text
    assert "stylize_iteration_seconds_count 1.0" in text


def test_two_scrapes_at_once_count_a_job_once(client, files, monkeypatch):
    finished = client[1].finished_since
    monkeypatch.setattr(client[1], "finished_since", lambda since: (finished(since), time.sleep(0.1))[0])
    job = post(client[0], files).json()["id"]
    client[1].claim(0)
    client[1].finish(job, "succeeded", None)
    metrics = client[0].app.state.service.metrics
    threads = [threading.Thread(target=metrics.text) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b'stylize_jobs_finished_total{state="succeeded"} 1.0' in metrics.text()


def test_the_openapi_document_tells_every_refusal(client):
    document = client[0].get("/openapi.json").json()
    refusals = set(document["paths"]["/v1/jobs"]["post"]["responses"])
    assert {"202", "400", "401", "409", "413", "415", "422", "429", "503", "507"} <= refusals
    for path in document["paths"].values():
        for operation in path.values():
            assert "HTTPValidationError" not in json.dumps(operation)


def test_problems_of_a_store_that_cannot_write():
    assert problems.of_storage(OSError(errno.EACCES, "no")).status_code == 500
    assert problems.of_storage(store.sqlite3.OperationalError("database or disk is full")).status_code == 507
    busy = problems.of_storage(store.sqlite3.OperationalError("database is locked"))
    assert (busy.status_code, busy.retry_after) == (503, 5)
