"""README against the program: its tables of options and of tests, and the code of its Library section."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import engine
from engine import Config, Stylizer, stylize
from engine.config import FRAME_ITERATIONS, TEMPORAL_WEIGHT, options

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY = {"size": 48, "iterations": 2, "scales": 1}


def test_the_table_of_options_is_that_of_the_command():
    section = README.split("\n## Command line\n")[1].split("\n### ")[0]
    told = set(re.findall(r"--[a-z][a-z-]+", re.sub(".*engine.export.*", "", section)))  # which has its own options
    flags = {flag for action in stylize._parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert told == flags - {"--out"}
    rows = dict(re.findall(r"^\| `(--[a-z-]+)[^|\n]*(?:\\\|[^|\n]*)*`[^|\n]*\| ([^|\n]*?) *\|", README, re.M))
    for option in options():
        assert rows["--" + option.name.replace("_", "-")] == shown(option.default), option.name
    own = {
        "--frame-iterations": FRAME_ITERATIONS,
        "--temporal-weight": TEMPORAL_WEIGHT,
        "--checkpoint-every": stylize._CHECKPOINT_EVERY,
        "--jobs": stylize._parser().get_default("jobs"),
    }
    assert {flag: rows[flag] for flag in own} == {flag: shown(default) for flag, default in own.items()}


def shown(default):
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(each if isinstance(each, str) else each[0] for each in default)
    return f"{default:g}" if isinstance(default, float) else str(default)


def test_presets_and_tests_that_are_named_are_there():
    own = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in own, name
    for name in re.findall(r"`(test_\w+\.py)`|tests/(test_\w+\.py)", README):
        assert (ROOT / "tests" / max(name)).is_file(), name
    section = README.split("\n### Presets\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `([\w-]+)`", section, re.M) == list(engine.presets.PRESETS)


class Small:
    """A Stylizer whose runs are small where they have no options."""

    def __init__(self, stylizer):
        self._own = stylizer

    def __getattr__(self, name):
        found = getattr(self._own, name)
        return self._with_options(found) if name in ("steps", "targets", "evaluate", "objective") else found

    def __call__(self, *given, **named):
        return self._with_options(self._own)(*given, **named)

    def _with_options(self, call):
        def called(*given, **named):
            return call(
                *given,
                **({} if any(isinstance(each, Config) for each in given) else {"config": Config(**TINY)}),
                **named,
            )

        return called


def test_the_code_of_the_library_section_runs(stylizer, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    code = re.search(r"```python\n(.*?)```", README.split("\n## Library\n")[1], re.S)[1]
    for name in set(re.findall(r'"(\w+\.(?:jpg|png))"', code)) - {"out.png"}:
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(name)
    monkeypatch.setattr(engine, "Stylizer", lambda **given: Small(stylizer), raising=False)
    monkeypatch.setattr(engine, "Config", lambda **given: Config(**{**given, **TINY}))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    with Image.open("out.png") as picture:
        assert picture.size == (48, 38)
    assert Path("style.safetensors").is_file()
    assert names["pixels"].grad.shape == names["pixels"].shape
    assert f"cpu, {names['stylizer'].precision}, 48 x 38: " in capsys.readouterr().out


@pytest.mark.parametrize(("optimizer", "average", "least"), [("lbfgs", 0, 1.2e3), ("adam", 0, 48), ("adam", 0.9, 60)])
def test_checkpoints_have_the_bytes_that_readme_says(pictures, optimizer, average, least):
    """Some 1.2 kB a pixel with L-BFGS, 48 bytes with Adam."""
    stylizer = Stylizer("embedded", "cpu")
    config = Config(
        size=96,
        scales=1,
        iterations=60,
        optimizer=optimizer,
        average=average,
        style_layers=("relu1_1",),
        content_layers=("relu1_1",),
    )
    for step in stylizer.steps(pictures["content"], pictures["style"], config):
        if step.iteration == 55:
            size = len(step.checkpoint()) / (step.image.width * step.image.height)
            break
    assert least <= size < 1.1 * least + 6
