import errno
import sys
from pathlib import Path

import pytest
from PIL import Image

from engine import image
from engine.jobs import SUFFIXES, Job, check_apart, is_frame, numbered, place, plan, product, same_file, shard


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("c/a.png", "c/b.JPG", "c/note.txt", "c/deep/d.png", "s/x.png", "s/y.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_every_content_with_every_style(folder):
    assert product(["c"], ["s"], "out") == [
        Job("c/a.png", ("s/x.png",), "out/a--x.png"),
        Job("c/a.png", ("s/y.webp",), "out/a--y.png"),
        Job("c/b.JPG", ("s/x.png",), "out/b--x.png"),
        Job("c/b.JPG", ("s/y.webp",), "out/b--y.png"),
    ]


def test_files_folders_and_patterns_each_file_once(folder):
    jobs = product(["c/a.png", "c/**/*.png", "c"], ["s/x.png"], "out/{content}.jpg")
    assert [(job.content, job.out) for job in jobs] == [
        ("c/a.png", "out/a.jpg"),
        ("c/deep/d.png", "out/d.jpg"),
        ("c/b.JPG", "out/b.jpg"),
    ]


def test_a_file_under_two_names_is_one(folder):
    for contents in (["c", "./c/a.png"], ["c", str(folder / "c" / "*.png")], ["c/../c/a.png", "c/a.png", "c"]):
        assert [Path(job.out).name for job in product(contents, ["s/x.png"], "out")] == ["a--x.png", "b--x.png"]


def test_a_name_that_looks_like_a_pattern_is_kept(folder):
    for name in ("c/{style}.jpg", "s/{content}.png"):
        (folder / name).touch()
    assert product(["c/{style}.jpg"], ["s/x.png"], "out")[0].out == "out/{style}--x.png"
    assert product(["c/{style}.jpg"], ["s/{content}.png"], "{style}-{content}.png")[0].out == "{content}-{style}.png"


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="left to whoever opens them")
def test_links_in_a_circle_are_told_as_files_that_cannot_be_used(folder):
    (folder / "loop").symlink_to("loop")
    for use in (
        lambda: place("loop/a.png"),
        lambda: same_file("loop", "c/a.png"),
        lambda: check_apart([("OUT", "loop")], []),
        lambda: check_apart([], [("CONTENT", "loop")]),
    ):
        with pytest.raises(OSError, match="loop") as told:
            use()
        assert told.value.errno == errno.ELOOP


def test_a_folder_gives_all_that_can_be_read():
    assert {suffix for suffix, kind in Image.registered_extensions().items() if kind in image._READ} <= set(SUFFIXES)


def test_a_name_with_brackets_is_a_file_if_there_is_one(folder):
    (folder / "c/[1].png").touch()
    assert product(["c/[1].png"], ["s/x.png"], "out")[0].content == "c/[1].png"


def test_two_jobs_may_not_write_one_file(folder, monkeypatch):
    with pytest.raises(ValueError, match="would both be"):
        product(["c"], ["s/x.png"], "out/{style}.png")
    (folder / "c/A.png").touch()
    both = ["c/a.png", "c/A.png"], ["s/x.png"]
    assert len(product(*both, "out")) == 2
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="would both be"):
        product(*both, "out")
    assert len(plan(*both, "s3://bucket/{content}.png", ())) == 2


@pytest.mark.parametrize("out", ["new.png", "deep/new.TIFF", "-"])
def test_one_picture_is_no_place_for_many(folder, out):
    with pytest.raises(ValueError, match="give a folder, or a pattern"):
        product(["c"], ["s"], out)
    (folder / "new.png").mkdir()
    assert product(["c"], ["s"], "new.png")[0].out == "new.png/a--x.png"  # it is a folder


def test_what_is_written_is_nothing_else(folder):
    (folder / "link").symlink_to("c/a.png")
    check_apart([("OUT", "out"), ("--trace", "trace")], [("CONTENT", "c/a.png"), ("STYLE", "c/a.png")])
    for written in ([("OUT", "link")], [("OUT", "c/../c/a.png")], [("OUT", "out"), ("--trace", "./out")]):
        with pytest.raises(ValueError, match=r"is both (CONTENT and OUT|OUT and --trace): give another file"):
            check_apart(written, [("CONTENT", "c/a.png")])


def test_nothing_found_is_a_mistake(folder):
    (folder / "empty").mkdir()
    for source in ("c/*.gif", "empty"):
        with pytest.raises(ValueError, match="no pictures there"):
            product([source], ["s"], "out")
    with pytest.raises(FileNotFoundError, match="z"):
        product(["c/z.png"], ["s"], "out")


def test_shards_share_the_jobs(folder):
    jobs = product(["c/**/*.png", "c"], ["s"], "out")
    parts = [shard(jobs, f"{i}/4") for i in range(1, 5)]
    assert sorted(job.out for part in parts for job in part) == sorted(job.out for job in jobs)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("0/4", "5/4", "1", "a/b", "1/0", "-1/3"):
        with pytest.raises(ValueError, match="I/N"):
            shard(jobs, wrong)


def test_frames_are_told_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outs = {place("o.png"), place("a-b.tar.webp"), "s3://bucket/o.png"}
    for path in ("o-00002.png", "./o-00010.png", str(tmp_path / "a-b.tar-00004.webp"), "s3://bucket/o-123456.png"):
        assert is_frame(path, outs)
        assert is_frame(path, outs, 2)
    assert numbered("a-b.tar.webp", 4) == "a-b.tar-00004.webp"
    assert not is_frame("o-00002.png", outs, 3)
    for path in ("o-2.png", "o-000002.png", "o-00002.jpg", "-00002", "-10", "x/o-00002.png", "o-00002", "-"):
        assert not is_frame(path, outs)


def test_a_folder_that_holds_results_is_read_again_as_it_was(tmp_path):
    """Results, and frames of them, are no sources, whatever pattern they have; but what is named is."""
    for name in ("a.jpg", "b.jpg", "s.png"):
        (tmp_path / name).touch()
    style, patterns = str(tmp_path / "s.png"), ["{content}.png", "{content}--{style}.webp"]
    for pattern in patterns:
        out = str(tmp_path / pattern)
        first = product([str(tmp_path / "?.jpg")], [style], out)
        assert len(first) == 2
        for job in first:
            for path in (job.out, numbered(job.out, 50)):
                Path(path).touch()
        again = product([str(tmp_path)], [style], out)
        assert [job for job in again if job.content.endswith(".jpg")] == first
        assert {Path(job.content).name for job in again} - {"a.jpg", "b.jpg"} == {"s.png"}
        assert len(product([str(tmp_path), numbered(first[0].out, 50)], [style], out)) == 4
        for job in first:
            for path in (job.out, numbered(job.out, 50)):
                Path(path).unlink()


def test_a_result_in_the_place_of_its_source_is_left_to_be_told(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "s.jpg").touch()
    (job,) = product([str(tmp_path / "*.png")], [str(tmp_path / "s.jpg")], str(tmp_path / "{content}.png"))
    with pytest.raises(ValueError, match="a picture to write"):
        check_apart([("a picture to write", job.out)], [("one to read", job.content)])
