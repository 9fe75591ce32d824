"""A real server: results under load, kills at random moments, and how it starts and stops."""

import contextlib
import http.client
import io
import itertools
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import Server, pixels, post

pytest.importorskip("fastapi")
from engine import Config

OPTIONS = {"size": 64, "iterations": 4, "scales": 1}


def png(array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def pair(pictures):
    return png(pictures["content"]), png(pictures["style"])


def expected(stylizer, pair, seed, **options) -> bytes:
    config = Config(**{**OPTIONS, **options}, init="noise", seed=seed)
    return stylizer(*pair, config).image.tobytes()


def submit(server, pair, number, clients, over=None, series="a", lengths=(4,)):
    """{key: (id, seed, iterations)} of `number` jobs from as many threads as there are clients; what is refused comes
    again. With `over` they go on until it is set."""
    accepted, problems = {}, []

    def client(which):
        for i in itertools.count(which, clients):
            if i >= number and (over is None or over.is_set()):
                return
            seed, iterations = i % 3, lengths[i % len(lengths)]
            options = {**OPTIONS, "iterations": iterations, "init": "noise", "seed": seed}
            while not (i >= number and over.is_set()):
                try:
                    status, body, headers = post(server, *pair, options, key=f"{series}-{i}")
                except (OSError, http.client.HTTPException):  # the server was killed: the key makes another try safe
                    time.sleep(0.1)
                    continue
                if status == 202:
                    accepted[f"{series}-{i}"] = body["id"], seed, iterations
                    break
                if status not in (429, 503):
                    problems.append(body)
                    return
                assert int(headers["retry-after"]) >= 1
                time.sleep(0.2)

    threads = [threading.Thread(target=client, args=(which,)) for which in range(clients)]
    for thread in threads:
        thread.start()
    return accepted, problems, threads


def check_all(server, accepted, pair, stylizer):
    """Every accepted job is done, each with the library's pixels, and no two are the same job."""
    wanted = {
        (seed, iterations): expected(stylizer, pair, seed, iterations=iterations)
        for seed, iterations in {(seed, iterations) for _, seed, iterations in accepted.values()}
    }
    assert len({job for job, *_ in accepted.values()}) == len(accepted)
    for job, seed, iterations in accepted.values():
        done = server.finished(job)
        assert done["state"] == "succeeded", done
        assert pixels(server.bytes(done["image"])) == wanted[seed, iterations]


def kill_under_load(server, pair, stylizer, jobs, clients, kills, longest, seed, lengths=(4,)):
    """Kill while clients send jobs; then every accepted job is done once, and nothing else lies about."""
    dice, over, met = random.Random(seed), threading.Event(), []
    accepted, problems, threads = submit(server, pair, jobs, clients, over, lengths=lengths)
    for _ in range(kills):
        time.sleep(dice.uniform(0.1, longest))
        folders = server.data / "jobs"
        met.append((len(list(folders.glob("*/content"))), len(list(folders.glob("*/checkpoint")))))
        server.kill(everything=dice.random() < 0.7)
        server.start(ready=dice.random() < 0.7)
    over.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(accepted) >= jobs
    check_all(server, accepted, pair, stylizer)
    with contextlib.closing(sqlite3.connect(server.data / "store.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        stored = {job for (job,) in database.execute("SELECT id FROM jobs")}
    sent = {job for job, *_ in accepted.values()}
    # A job whose answer a last kill swallowed is on the disk though its client gave up: at most one for each client.
    assert sent <= stored
    assert len(stored) <= len(sent) + clients
    for job in stored:
        assert server.finished(job)["state"] == "succeeded"
    assert {path.name for path in folders.iterdir()} == stored
    assert {path.name for path in folders.glob("*/*")} == {"result.png"}
    print(f"{kills} kills, {len(accepted)} jobs accepted, all done once; unfinished jobs/checkpoints at each kill:")
    print(" ", *(f"{waiting}/{saved}" for waiting, saved in met))


def test_jobs_of_eight_clients_survive_a_kill_and_sigterm(tmp_path, pair, stylizer):
    with Server(tmp_path / "data") as server:
        kill_under_load(server, pair, stylizer, jobs=8, clients=8, kills=1, longest=2, seed=0, lengths=(2,))
        unfinished = [post(server, *pair, {**OPTIONS, "iterations": 100_000})[1]["id"] for _ in range(9)]
        server.finished(unfinished[0], until=("running",))
        while not server.get(f"/v1/jobs/{unfinished[0]}")["iteration"]:  # before the first there is nothing to keep
            time.sleep(0.05)
        status, seconds = server.terminate()
        assert status == 0, server.log.read_text()
        assert seconds < 10
        assert len(list((server.data / "jobs").glob("*/checkpoint"))) == 1
    print(f"SIGTERM with one job running and eight waiting: exit after {seconds:.1f} s")
    text = server.log.read_text()
    assert "Traceback" not in text
    database = sqlite3.connect(server.data / "store.sqlite")
    rows = database.execute("SELECT id, state FROM jobs WHERE state != 'succeeded'").fetchall()
    database.close()
    assert set(rows) == {(job, "queued") for job in unfinished}


@pytest.mark.slow
def test_twenty_kills_under_load_lose_nothing(tmp_path, pair, stylizer):
    lengths = (20,) * 6 + (300,)  # some run long enough to be checkpointed
    with Server(tmp_path / "data", "--workers", "2") as server:
        kill_under_load(server, pair, stylizer, jobs=60, clients=8, kills=20, longest=6, seed=1, lengths=lengths)


@pytest.mark.slow
def test_two_hundred_jobs_leave_no_memory_thread_or_handle(tmp_path, pair, stylizer):
    with Server(tmp_path / "data", "--per-client", "64") as server:
        warm, _, threads = submit(server, pair, 16, 8, series="warm")
        for thread in threads:
            thread.join()
        check_all(server, warm, pair, stylizer)
        before = footprint(server)
        start = time.monotonic()
        accepted, problems, threads = submit(server, pair, 200, 8, lengths=(5,))
        for thread in threads:
            thread.join()
        assert not problems
        assert len(accepted) == 200
        check_all(server, accepted, pair, stylizer)
        seconds = time.monotonic() - start
        after = footprint(server)
    print(f"200 jobs of 8 clients: {seconds:.1f} s; (resident bytes, threads, open files) of each process:")
    for pid, (memory, tasks, handles) in before.items():
        print(f"  {before[pid]} -> {after[pid]}")
        assert after[pid][0] < memory + 16 * 2**20
        assert after[pid][1] <= tasks
        assert after[pid][2] <= handles


def footprint(server):
    """{pid: (resident bytes, threads, open files)} of the server and its workers, once its clients are gone."""
    time.sleep(11)  # kept connections are closed after 10 s
    found = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # of a process that ended meanwhile
            if folder.name.isdecimal() and os.getpgid(int(folder.name)) == server.process.pid:
                status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                memory = int(status["VmRSS"].split()[0]) * 1024
                found[int(folder.name)] = memory, int(status["Threads"]), len(list((folder / "fd").iterdir()))
    return found


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again(tmp_path, pair, stylizer):
    with Server(tmp_path / "data") as server:
        _, body, _ = post(server, *pair, {**OPTIONS, "iterations": 100_000})
        server.finished(body["id"], until=("running",))
        (pid,) = [pid for pid in children(server.process.pid) if b"engine.serve.worker" in command(pid)]
        os.kill(int(pid), signal.SIGKILL)
        server.finished(body["id"], until=("queued",))
        _, other, _ = post(server, *pair, {**OPTIONS, "init": "noise"}, None)
        request = urllib.request.Request(f"{server.url}/v1/jobs/{body['id']}", method="DELETE")
        urllib.request.urlopen(request).close()
        assert server.finished(body["id"])["state"] == "cancelled"
        done = server.finished(other["id"])
        assert pixels(server.bytes(done["image"])) == expected(stylizer, pair, 0)


def children(pid: int) -> list[str]:
    """Ids of the processes that the threads of this one have started."""
    return " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()


def command(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def serve(*words, **environment):
    clean = {name: value for name, value in os.environ.items() if name != "STYLIZE_TOKEN"}
    command = [sys.executable, "-m", "engine.serve", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}, timeout=60)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "STYLIZE_TOKEN"),
        (["--host", "::"], "STYLIZE_TOKEN"),
        (["--workers", "0"], "from 1"),
        (["--keep", "-1"], "above 0"),
        (["--log", "xml"], "text, json"),
        (["--proxy", "*"], "IPv4"),
        (["--token-file", "/nowhere"], "No such file"),
        (["--port", "http"], "invalid int"),
        (["--device", "gpu"], "device 'gpu' is unknown"),
        (["--precision", "fp61"], "did you mean fp16"),
        (["--max-size", "0"], "from 1"),
        (["--reserve", "-1"], "from 0"),
        (["--host", "127.example.com"], "STYLIZE_TOKEN"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_status_2(tmp_path, words, said):
    done = serve("--data", str(tmp_path), *words)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]


def test_a_server_whose_workers_cannot_start_ends(tmp_path):
    """Instead of taking jobs for ever."""
    done = serve("--data", str(tmp_path), "--port", "0", "--weights", str(tmp_path / "missing.pth"), "--device", "cpu")
    assert done.returncode == 2
    assert "missing.pth does not exist" in done.stderr
    assert done.stderr.endswith("engine.serve: no worker can start with these options: see above\n")


def test_a_port_that_is_taken_is_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = serve("--data", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "address already in use" in done.stderr


def test_a_folder_serves_one_server(tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / "server.lock"):
        done = serve("--data", str(tmp_path), "--port", "0")
    assert done.returncode == 2
    assert "in use by another server" in done.stderr


def test_an_accepted_job_is_whole_after_a_kill_at_any_moment(tmp_path):
    """The store alone, whose writer is killed again and again: what it said it had, is there in full."""
    code = (
        "import sys, os\n"
        "from engine.serve.store import Store\n"
        "store, i = Store(sys.argv[1]), 0\n"
        "while True:\n"
        "    name = os.urandom(16).hex()\n"
        "    row = dict(id=name, client='c', key=None, fingerprint='', options='{}')\n"
        "    row |= dict(styles=1, priority=0, deadline=1)\n"
        "    store.add(row, b'c' * 9999, [b's' * 9999], (10**9, 10**9))\n"
        "    print(name, flush=True)\n"
    )
    from engine.serve.store import Store

    dice = np.random.default_rng(0)
    said = []
    for _ in range(6):
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            said.append(process.stdout.readline().strip())
            time.sleep(dice.uniform(0, 0.2))
            process.kill()
            said += [line.strip() for line in process.stdout if line.endswith("\n")]
    store = Store(tmp_path)
    store.recover()
    assert len(said) > 6
    for name in said:
        assert store.job(name)["state"] == "queued"
    for folder in (tmp_path / "jobs").iterdir():
        assert (folder / "content").read_bytes() == b"c" * 9999
        assert (folder / "style-0").read_bytes() == b"s" * 9999
    store.close()
