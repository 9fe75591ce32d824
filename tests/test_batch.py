"""Contents x styles: what is planned, painted once, retried, recorded and skipped."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fsspec")
from engine import BackendError, Config, batch, replay, stylize
from engine.jobs import Job

OPTIONS = '{"size": 48, "iterations": 2, "scales": 1, "init": "noise"}'


@pytest.fixture
def folders(tmp_path, pictures):
    for name in ("contents", "styles"):
        (tmp_path / name).mkdir()
    for i in range(3):
        Image.fromarray(np.roll(pictures["content"], i, axis=0)).save(tmp_path / "contents" / f"c{i}.png")
    Image.fromarray(pictures["style"]).save(tmp_path / "styles" / "s.jpg")
    return tmp_path


def words(folders, *more):
    styles = ["--styles", str(folders / "styles"), "-o", str(folders / "out")]
    return [str(folders / "contents"), *styles, "--options", OPTIONS, "--device", "cpu", "--weights", "embedded", *more]


def test_contents_and_styles_are_painted_once_and_failures_are_skipped(folders, stylizer, capsys, caplog):
    (folders / "contents" / "broken.png").write_bytes(b"no picture")
    assert batch.main(words(folders)) == 1
    summary = json.loads(capsys.readouterr().out)
    assert (summary["painted"], summary["there_already"]) == (3, 0)
    assert [Path(each["content"]).name for each in summary["failed"]] == ["broken.png"]
    assert "not a picture" in summary["failed"][0]["reason"]
    assert sorted(path.name for path in (folders / "out").iterdir()) == ["c0--s.png", "c1--s.png", "c2--s.png"]
    config = Config(**json.loads(OPTIONS))
    result = stylizer(folders / "contents" / "c1.png", folders / "styles" / "s.jpg", config).image
    np.testing.assert_array_equal(np.asarray(Image.open(folders / "out" / "c1--s.png")), np.asarray(result))
    (folders / "contents" / "broken.png").unlink()
    times = [path.stat().st_mtime_ns for path in sorted((folders / "out").iterdir())]
    assert batch.main(words(folders)) == 0
    assert json.loads(capsys.readouterr().out)["there_already"] == 3
    assert times == [path.stat().st_mtime_ns for path in sorted((folders / "out").iterdir())]
    assert not caplog.records
    (folders / "out" / "c2--s.png").unlink()
    *first, options, device, own, weights, kind = words(folders)
    assert batch.main([*first, options.replace("{", '{"seed": 7, '), device, own, weights, kind]) == 0
    assert "2 of the pictures there were made with other options, or not by this program" in caplog.text
    capsys.readouterr()
    caplog.clear()
    assert batch.main([*first, options.replace("{", '{"seed": 7, '), device, own, weights, kind, "--overwrite"]) == 0
    assert json.loads(capsys.readouterr().out)["painted"] == 3
    assert not caplog.records
    seeds = {replay.read(str(path))["options"]["seed"] for path in (folders / "out").iterdir()}
    assert seeds == {7}


def test_a_batch_writes_over_nothing_that_it_reads(folders, capsys, monkeypatch):
    """Whether it is a content, the picture to start from, or linked to one, and however it is written."""
    monkeypatch.setattr(batch, "Processes", lambda *make: pytest.fail("a worker was started"))
    contents, styles, linked = folders / "contents", folders / "styles", folders / "linked"
    made = contents / "c1--s.png"
    made.write_bytes((contents / "c2.png").read_bytes())
    linked.mkdir()
    (linked / "c1--s.png").symlink_to(contents / "c1.png")
    start = json.dumps({"init": str(made)})
    for given, out in (
        ([contents / "c1.png", made], contents),
        ([contents / "c1.png", f"file://{made}"], contents),
        ([contents / "c1.png", "--options", start], contents),
        ([contents / "c1.png"], linked),
    ):
        assert batch.main([*map(str, given), "--styles", str(styles), "-o", str(out), "--overwrite"]) == 2
        assert "c1--s.png is both one to read and a picture to write" in capsys.readouterr().err


def test_pictures_of_a_batch_are_replayed(folders, capsys):
    """Each carries its manifest, which names its sources as files."""
    painter = batch.Painter("embedded", "cpu", "auto", Config(**json.loads(OPTIONS)), None)
    task = batch.plan([str(folders / "contents")], [str(folders / "styles")], str(folders / "out"))[1]
    assert painter.paint(task) == ""
    record = replay.read(task.out)
    assert (record["content"]["name"], record["styles"][0]["name"]) == ("c1.png", "s.jpg")
    assert record["iterations"] == {"done": 2, "total": 2}
    again = str(folders / "again.png")
    sources = [str(folders / "contents" / "c1.png"), str(folders / "styles" / "s.jpg")]
    assert stylize.main([*sources, "--replay", task.out, "-o", again, "--quiet"]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(task.out)))


class Stub:
    """A pool whose workers answer as they are told: how often they die over a task, or that they cannot work."""

    def __init__(self, deaths=(), answer="", death=None):
        self.deaths, self.waiting, self.started, self.stopped, self.most = dict(deaths), [], 0, 0, 0
        self.answer, self.death = answer, death or batch.DiedError("killed")

    def start(self):
        self.started += 1
        return object()

    def send(self, worker, task):
        self.waiting.append((worker, task))
        self.most = max(self.most, len(self.waiting))

    def outcome(self):
        worker, task = self.waiting.pop(0)
        if self.deaths.get(task, 0) > 0:
            self.deaths[task] -= 1
            return worker, self.death
        return worker, self.answer

    def stop(self, worker):
        self.stopped += 1


def test_a_task_outlives_two_workers_and_no_more():
    tasks = [Job(f"c{i}", ("s",), f"o{i}") for i in range(6)]
    pool = Stub({tasks[1]: 2, tasks[4]: 3})
    answers = dict(batch.drive(pool, tasks, 2))
    assert len(answers) == 6
    assert [task.content for task, reason in answers.items() if reason] == ["c4"]
    assert pool.most == 2


@pytest.mark.parametrize(
    ("weights", "device", "said"),
    [("missing.pth", "cpu", "does not exist"), ("embedded", "cqu", "did you mean cpu"), ("embedded", "cuda", "device")],
)
def test_a_worker_that_cannot_work_ends_the_batch(folders, capsys, monkeypatch, weights, device, said):
    """At once: no other one is started."""
    if device == "cuda":
        monkeypatch.setattr("engine.provider.check", lambda name: (_ for _ in ()).throw(BackendError("device cuda")))
    answer = batch.Painter(weights, device, "auto", Config(), None).paint(Job("c.png", ("s.png",), "o.png"))
    pool = Stub(answer=answer)
    monkeypatch.setattr(batch, "Processes", lambda *make: pool)
    assert batch.main(words(folders)) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert json.loads(captured.out)["painted"] == 0
    assert pool.started == 1


def test_a_precision_that_the_device_has_not_ends_the_batch(folders, capsys):
    assert batch.main(words(folders, "--precision", "fp16", "--device", "cpu")) == 2
    assert "precision fp16: device cpu has fp32 and bf16" in capsys.readouterr().err


def test_a_worker_that_cannot_start_among_others_that_paint_has_died():
    tasks = [Job(f"c{i}", ("s",), f"o{i}") for i in range(3)]
    pool = Stub({tasks[1]: 1}, death=batch.StartError("out of memory"))
    assert set(batch.drive(pool, tasks, 1)) == {(task, "") for task in tasks}
    assert (pool.started, pool.stopped) == (2, 2)
    pool = Stub({tasks[1]: 9}, death=batch.StartError("out of memory"))
    with pytest.raises(batch.StartError):
        list(batch.drive(pool, tasks, 1))
    assert pool.started == 3


def test_workers_that_die_over_every_picture_end_the_batch():
    """Not if one has answered: then it is those pictures."""
    tasks = [Job(f"c{i}", ("s",), f"o{i}") for i in range(100)]
    pool = Stub(dict.fromkeys(tasks, 9))
    with pytest.raises(batch.StartError, match="workers died over 3 contents, and none has answered"):
        list(batch.drive(pool, tasks, 1))
    assert pool.started == 3
    pool = Stub(dict.fromkeys(tasks[1:5], 9), answer="damaged")
    assert len(dict(batch.drive(pool, tasks, 1))) == 100
    first = [Job("big", (style,), style) for style in "xyz"]  # one content in front, over which all die
    pool = Stub(dict.fromkeys(first, 9))
    found = dict(batch.drive(pool, [*first, *tasks], 2))
    assert {task for task, reason in found.items() if reason} == set(first)
    assert len(found) == 103


def test_the_death_of_a_process_is_an_answer():
    pool = batch.Processes("embedded", "cpu", Config(), 1)
    worker = pool.start()
    pool._busy[worker[0]] = worker
    worker[1].kill()
    assert wait([worker[0]], 60)
    found, answer = pool.outcome()
    assert found is worker
    assert isinstance(answer, batch.DiedError)
    assert str(answer) == "status -9"
    pool.send(worker, Job("c.png", ("s.png",), "o.png"))  # it is told no earlier
    assert isinstance(pool.outcome()[1], batch.DiedError)
    pool.stop(worker)


def test_a_worker_that_cannot_start_leaves_its_task_to_the_others():
    class Pool(Stub):
        def outcome(self):
            worker, _ = self.waiting.pop(-1)  # the second worker is the faster one, until it is gone
            return worker, batch.StartError("no room") if worker is self.second else ""

        def start(self):
            self.second = super().start()
            return self.second

    tasks = [Job(f"c{i}", ("s",), f"o{i}") for i in range(5)]
    pool = Pool()
    assert set(batch.drive(pool, tasks, 2)) == {(task, "") for task in tasks}
    assert (pool.started, pool.stopped) == (2, 2)


@pytest.mark.parametrize(
    ("workers", "threads", "expected"), [(1, None, 8), (2, None, 4), (16, None, 2), (2, "3", 3)]
)  # three pictures
def test_workers_share_the_processors(folders, capsys, monkeypatch, workers, threads, expected):
    found = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    monkeypatch.setattr("engine.stylizer.Stylizer", lambda *a, threads: found.append(threads))
    monkeypatch.setattr(batch, "Processes", lambda *make: (batch.Painter(*make), Stub())[1])
    more = ["--threads", threads] if threads else []
    assert batch.main(words(folders, "--workers", str(workers), *more)) == 0
    assert found == [expected]


def test_urls_are_read_and_written(pictures, stylizer):
    import fsspec

    files = fsspec.filesystem("memory")
    for name in ("content", "style"):
        with files.open(f"/in/{name}[1].png", "wb") as file:  # which is no pattern
            Image.fromarray(pictures[name]).save(file, "PNG")
    (task,) = batch.plan(["memory://in/content[1].png"], ["memory://in/style[1].png"], "memory://out")
    painter = batch.Painter("embedded", "cpu", "auto", Config(**json.loads(OPTIONS)), None)
    assert painter.paint(task) == ""
    assert files.ls("/out", detail=False) == ["/out/content[1]--style[1].png"]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_painted(folders, capsys, monkeypatch):
    monkeypatch.setattr(batch, "Processes", lambda *make: pytest.fail("a worker was started"))
    out = folders / "file"
    out.write_text("mine")
    given = words(folders)
    given[given.index("-o") + 1] = str(out)
    assert batch.main(given) == 2
    assert str(out) in capsys.readouterr().err
    assert out.read_text() == "mine"


def test_the_probe_of_a_folder_is_gone(tmp_path, monkeypatch):
    from fsspec.implementations.local import LocalFileSystem

    def kept(self, path):
        raise PermissionError

    batch._check_writable(str(tmp_path / "new"))
    assert not list((tmp_path / "new").iterdir())
    monkeypatch.setattr(LocalFileSystem, "rm_file", kept)
    batch._check_writable(str(tmp_path / "new"))  # a folder in which nothing may be removed will do


@pytest.mark.parametrize(("works", "error"), [(True, RuntimeError), (False, RuntimeError), (False, ValueError)])
def test_a_worker_whose_device_is_broken_ends(folders, monkeypatch, works, error):
    def breaks(*arguments):
        raise error("an illegal memory access")

    worker = batch.Painter("embedded", "cpu", "auto", Config(), 1)
    monkeypatch.setattr("engine.provider.works", lambda device: works)
    monkeypatch.setattr("engine.painting.begin", breaks)
    (content,) = (folders / "contents").glob("c1.png")
    job = Job(str(content), (str(content),), "o.png")
    if works or error is ValueError:
        assert worker.paint(job) == "an illegal memory access"
    else:
        with pytest.raises(RuntimeError, match="illegal"):
            worker.paint(job)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_told_with_the_summary(folders, capsys, monkeypatch, number):
    class Pool(Stub):
        def outcome(self):
            if self.waiting[0][1].content.endswith("c2.png"):
                signal.raise_signal(number)
            return super().outcome()

    monkeypatch.setattr(batch, "Processes", lambda *make: Pool())
    assert batch.main(words(folders)) == 130
    captured = capsys.readouterr()
    assert json.loads(captured.out)["painted"] == 2
    assert captured.err.endswith("engine.batch: interrupted; the same command paints the rest\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_before_the_first_worker_is_told(folders, capsys, monkeypatch, number):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(batch, "plan", lambda *given: signal.raise_signal(number))
    assert batch.main(words(folders)) == 130
    assert capsys.readouterr().err == "engine.batch: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def command_of(process):
    """The command line of a process, nothing if it has ended."""
    with contextlib.suppress(OSError):
        return Path("/proc", process, "cmdline").read_bytes()
    return b""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are listed by Linux")
def test_sigterm_ends_the_workers(folders):
    command = [sys.executable, "-m", "engine.batch", *words(folders, "--threads", "1")]
    command[command.index(OPTIONS)] = '{"size": 64, "iterations": 1000000}'
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        children, end = Path(f"/proc/{process.pid}/task/{process.pid}/children"), time.monotonic() + 60
        try:
            while not (found := [each for each in children.read_text().split() if b"spawn_main" in command_of(each)]):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.05)
            time.sleep(1)
            process.terminate()
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert json.loads(out)["painted"] == 0
    assert err.endswith("engine.batch: interrupted; the same command paints the rest\n")
    assert not any(map(command_of, found))


def test_a_picture_that_is_found_twice_is_painted_once(folders, monkeypatch):
    contents = folders / "contents"
    styles, out = [str(folders / "styles")], str(folders / "out")
    once = batch.plan([str(contents)], styles, out)
    assert batch.plan([str(contents), str(contents / "c1.png")], styles, out) == once
    monkeypatch.chdir(folders)
    assert batch.plan(["contents", "contents/c1.png"], styles, out) == once


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    out, write = tmp_path / "out.png", Path.write_bytes
    out.write_text("old")

    def broken(self, data):
        write(self, data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(OSError, match="No space"):
        batch._write(str(out), b"new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("out.png", "old")]


def test_files_of_a_server_keep_its_name_and_the_login(monkeypatch):
    from fsspec.implementations.ftp import FTPFileSystem

    monkeypatch.setattr(FTPFileSystem, "_connect", lambda self: None)
    monkeypatch.setattr(FTPFileSystem, "__del__", lambda self: None)
    monkeypatch.setattr(FTPFileSystem, "exists", lambda self, path: True)
    monkeypatch.setattr(FTPFileSystem, "isdir", lambda self, path: True)
    kinds = {"b.png": "file", "dir.png": "directory", "a.png": "file"}
    found = [{"name": f"/in/{name}", "type": kind} for name, kind in kinds.items()]
    monkeypatch.setattr(FTPFileSystem, "ls", lambda self, path, detail: found)
    url = "ftp://me:secret@host/in"
    assert batch._pictures(f"{url}/") == [f"{url}/a.png", f"{url}/b.png"]


def test_a_file_system_that_is_missing_is_named(folders, capsys, monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    assert batch.main(words(folders)) == 2
    assert capsys.readouterr().err == "engine.batch: Install s3fs to access S3\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--options": '{"size": 1}'}, "size"),
        ({"--options": "["}, "--options is not JSON"),
        ({"--options": "[1]"}, "JSON object"),
        ({"--options": '{"sice": 1}'}, "did you mean size?"),
        ({"--workers": "0"}, "from 1"),
        ({"--gpus": "1"}, "for the actors of --ray"),
        ({"--threads": "0"}, "from 1"),
        ({"--styles": "/nowhere"}, "does not exist"),
        ({"-o": ""}, "-o '': give a folder"),
        ({"-o": "{content}.png"}, "-o '{content}.png': give a folder, results are named CONTENT--STYLE.png"),
        ({"--options": '{"size": [64, 64]}'}, "size WxH is for runs without content"),
        ({"--options": '{"init": "nosuch.png"}'}, "nosuch.png: No such file"),
        ({"--options": '{"init": "-"}'}, "init - can be read for one picture only"),
        ({"--options": '{"style_blend": [1, 2]}'}, "2 weights, there are 1 styles"),
        ({"--options": '{"style_scale": [1, 2]}'}, "2 numbers, there are 1 styles"),
    ],
)
def test_mistakes_are_told_in_one_line(folders, capsys, monkeypatch, change, said):
    """Before a worker is started."""
    monkeypatch.setattr(batch, "Processes", lambda *make: pytest.fail("a worker was started"))
    ((flag, value),) = change.items()
    given = words(folders, "--workers", "1", "--threads", "1", "--gpus", "0")
    given[given.index(flag) + 1] = value
    assert batch.main(given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_folder_in_the_place_of_a_picture_is_told(folders, capsys, monkeypatch):
    monkeypatch.setattr(batch, "Processes", lambda *make: pytest.fail("a worker was started"))
    (folders / "out" / "c1--s.png").mkdir(parents=True)
    assert batch.main(words(folders)) == 2
    assert capsys.readouterr().err == f"engine.batch: {folders}/out/c1--s.png is a folder\n"


def test_a_folder_gives_its_files_and_links_to_files(folders):
    (folders / "contents" / "dir.png").mkdir()
    (folders / "contents" / "linked.png").symlink_to("dir.png")
    (folders / "contents" / "c3.png").symlink_to("c0.png")
    assert [Path(each).name for each in batch._pictures(str(folders / "contents"))] == [f"c{i}.png" for i in range(4)]


def test_colons_in_the_name_of_a_file_are_no_chain(folders, monkeypatch):
    monkeypatch.chdir(folders)
    Path("x::y.jpg").write_bytes(b"x")
    assert batch._pictures("x::y.jpg") == ["x::y.jpg"]
    assert batch._read("x::y.jpg") == b"x"
    batch._write("z::1.png", b"z")
    assert Path("z::1.png").read_bytes() == b"z"


def test_a_loss_that_is_no_number_is_not_in_the_manifest(folders, monkeypatch):
    from engine.result import Step

    monkeypatch.setattr(Step, "loss", property(lambda self: float("nan") if self.iteration == 1 else 2.0))
    painter = batch.Painter("embedded", "cpu", "auto", Config(**json.loads(OPTIONS)), None)
    task = batch.plan([str(folders / "contents")], [str(folders / "styles")], str(folders / "out"))[0]
    assert painter.paint(task) == ""
    assert replay.read(task.out)["losses"] == [[2, 2.0]]


def test_two_contents_of_one_name_are_refused(folders):
    (folders / "contents" / "c0.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="both be written"):
        batch.plan([str(folders / "contents")], [str(folders / "styles")], "out")


@pytest.mark.slow
def test_a_cluster_of_two_nodes_of_which_one_is_killed(folders):
    """In a process of its own, as Ray leaves threads and warnings behind."""
    done = subprocess.run(
        [sys.executable, __file__, *words(folders, "--ray", "auto", "--workers", "2", "--threads", "1")],
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, again = (
        json.loads(text) for text in re.findall(r"^\{.*?^\}", done.stdout, re.M | re.S)
    )  # between Ray's lines
    assert (first["painted"], first["failed"]) == (12, [])
    assert (again["painted"], again["there_already"]) == (0, 12)
    assert len(list((folders / "out").iterdir())) == 12


def on_a_cluster(arguments):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 10**8})
    other = cluster.add_node(num_cpus=1, object_store_memory=10**8)
    ray.init(address=cluster.address, log_to_driver=False)
    contents, out = Path(arguments[0]), Path(arguments[arguments.index("-o") + 1])
    image = np.asarray(Image.open(contents / "c0.png"))
    for i in range(3, 12):
        Image.fromarray(np.roll(image, i, axis=1)).save(contents / f"c{i}.png")

    def kill():
        while not (out.exists() and len(list(out.glob("*.png"))) >= 2):
            time.sleep(0.02)
        cluster.remove_node(other, allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=10**8)

    killer = threading.Thread(target=kill)
    killer.start()
    status = batch.main(arguments)
    killer.join()
    status = status or batch.main(arguments)
    ray.shutdown()
    cluster.shutdown()
    return status


if __name__ == "__main__":
    sys.exit(on_a_cluster(sys.argv[1:]))


def test_a_worker_that_is_ended_leaves_no_half_written_file(tmp_path):
    code = (
        "import multiprocessing, sys, time\n"
        "from pathlib import Path\n"
        "from engine import batch, image\n"
        "class Slow:\n"
        "    def paint(self, task):\n"
        "        with image.atomic(Path(task)) as temporary:\n"
        "            temporary.touch()\n"
        "            print('half', flush=True)\n"
        "            time.sleep(60)\n"
        "batch.Painter = Slow\n"
        "ours, theirs = multiprocessing.Pipe()\n"
        "ours.send(sys.argv[1])\n"
        "batch._serve(theirs)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out.png")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"half\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.terminate()
        assert process.wait(30) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
