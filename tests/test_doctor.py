"""The report on a machine."""

import signal
import subprocess
import sys

import pytest

from engine import BackendError, doctor, provider, stylizer


def report(capsys):
    status, text = doctor.main([]), capsys.readouterr().out
    return status, dict(line.split(maxsplit=1) for line in text.splitlines())


def test_each_device_is_tried_and_what_is_missing_is_named(capsys, monkeypatch, tmp_path):
    painted = []

    def check(device):
        if device in ("cuda", "tensorrt"):
            raise BackendError(f"device {device}: {device} is missing: pip install it")

    class Own(stylizer.Stylizer):
        def __init__(self, weights="auto", device="auto", *rest, **options):
            painted.append(device)
            if device == "cudnn":
                raise RuntimeError("out of\nmemory")
            super().__init__("embedded", "cpu" if device == "auto" else device, *rest, **options)

    monkeypatch.setattr(provider, "check", check)
    monkeypatch.setattr(stylizer, "Stylizer", Own)
    monkeypatch.setenv("STYLIZE_HOME", str(tmp_path / "not" / "yet"))
    status, found = report(capsys)
    assert status == 0
    assert list(found) == ["versions", "memory", *provider.DEVICES[1:], "defaults", "cache"]
    assert painted == ["cpu", "onnxruntime", "cudnn", "auto"]
    _, precision = provider.resolve("cpu", "auto")
    for device, taken in (("cpu", precision), ("onnxruntime", "fp32")):
        assert found[device].startswith(f"works: {taken}, a first small picture in ")
    assert found["cudnn"] == "breaks: out of memory"
    assert found["cuda"] == "cuda is missing: pip install it"
    assert found["defaults"].startswith(f"--device cpu --precision {precision} --weights embedded; --weights imagenet")
    assert found["cache"] == f"{tmp_path / 'not' / 'yet'} (STYLIZE_HOME)"
    assert not list(tmp_path.iterdir())


def test_defaults_that_do_not_work_are_status_1(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_device", lambda device: "works")

    class Broken:
        def __init__(self, *arguments, **options):
            raise OSError(28, "No space left on device", "weights")

    monkeypatch.setattr(stylizer, "Stylizer", Broken)
    status, found = report(capsys)
    assert (status, found["defaults"]) == (1, "weights: No space left on device")


def test_a_wrong_environment_is_told_and_not_thrown(capsys, monkeypatch):
    monkeypatch.setenv("STYLIZE_CACHE_BYTES", "1G")
    status, found = report(capsys)
    assert status == 1
    assert found["cpu"].startswith("breaks: STYLIZE_CACHE_BYTES '1G'")
    assert found["defaults"].startswith("STYLIZE_CACHE_BYTES '1G'")


def test_a_cache_below_a_file_is_told(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("STYLIZE_HOME", str(tmp_path / "file" / "home"))
    assert "cannot be written: Not a directory" in doctor._cache()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_told(capsys, monkeypatch, number):
    monkeypatch.setattr(doctor, "_device", lambda device: signal.raise_signal(number))
    assert doctor.main([]) == 130
    assert capsys.readouterr().err == "engine.doctor: interrupted\n"


def test_mistakes_are_one_line():
    done = subprocess.run([sys.executable, "-m", "engine.doctor", "--jsn"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "engine.doctor: unrecognized arguments: --jsn (--help lists the options)\n"
