"""The examples of README's Service section run as they stand, with small pictures."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

import engine
from engine import Config

TINY = {"size": 48, "iterations": 4, "scales": 1}
README = Path(__file__).parent.parent / "README.md"


@pytest.fixture
def examples(monkeypatch, stylizer):
    """What each example defines."""
    monkeypatch.setattr(engine, "Stylizer", lambda: stylizer, raising=False)
    monkeypatch.setattr(engine, "Config", lambda **given: Config(**{**given, **TINY}))
    section = README.read_text().split("\n## Service\n")[1].split("\n## ")[0]
    found = []
    for code in re.findall(r"```python\n(.*?)```", section, re.S):
        names: dict = {}
        exec(compile(code, str(README), "exec"), names)
        found.append(names)
    return found


@pytest.fixture
def files(pictures, tmp_path):
    for name in ("content", "style"):
        Image.fromarray(pictures[name]).save(tmp_path / f"{name}.png")
    return {name: str(tmp_path / f"{name}.png") for name in ("content", "style")}


def test_a_service_of_ones_own(examples, files, stylizer):
    client = TestClient(examples[0]["app"])
    sent = {name: Path(path).read_bytes() for name, path in files.items()}
    answer = client.post("/paint", files=sent)
    assert answer.status_code == 200
    own = stylizer(files["content"], files["style"], Config(**TINY)).image
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), np.asarray(own))
    assert client.post("/paint", files={**sent, "style": b"no picture"}).status_code == 422


def test_a_worker_behind_a_queue(examples, files, stylizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work, message = examples[1]["work"], {"id": "7", **files}
    assert work(message, lambda: True) is False
    assert Path("7.checkpoint").exists()
    assert work(message, lambda: False) is True
    assert not Path("7.checkpoint").exists()
    own = stylizer(files["content"], files["style"], Config(**TINY)).image
    np.testing.assert_array_equal(np.asarray(Image.open("7.png")), np.asarray(own))
