import contextlib
import errno
import io
import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine import Config, batches, image, jobs, painting, sheet, stylize
from engine.config import options
from engine.targets import Targets

SMALL = ["--size", "48", "--scales", "1", "--iterations", "3", "--weights", "embedded", "--device", "cpu"]
SMALL_CONFIG = {"size": 48, "scales": 1, "iterations": 3}


@pytest.fixture
def pair(tmp_path, pictures):
    """Paths of a content and a style picture, and of the result."""
    for name in ("content", "style"):
        Image.fromarray(pictures[name]).save(tmp_path / f"{name}.png")
    return str(tmp_path / "content.png"), str(tmp_path / "style.png"), str(tmp_path / "out.png")


def run(*arguments, **options):
    return subprocess.run([sys.executable, "-m", "engine.stylize", *arguments], capture_output=True, **options)


def test_makes_a_picture(pair, tmp_path, capsys):
    content, style, out = pair
    assert stylize.main([content, style, "-o", out, *SMALL]) == 0
    with Image.open(out) as picture:
        assert picture.size == (48, 34)
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["content.png", "out.png", "style.png"]


def test_help_lists_every_option():
    done = run("--help", text=True)
    assert done.returncode == 0
    for option in options():
        assert "--" + option.name.replace("_", "-") in done.stdout
        assert option.metadata["help"].split()[0] in done.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys, engine, engine.stylize as s\ntry: s.main(['--help'])\nexcept SystemExit: pass\nprint(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert not modules & {"torch", "numpy", "onnxruntime", "onnx", "PIL", "tqdm"}


def test_version(capsys):
    assert stylize.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == version("gatys-engine")


OPTIONS = {
    "size": ("64", 64),
    "iterations": ("5,4", (5, 4)),
    "scales": ("2", 2),
    "content_weight": ("2", 2.0),
    "style_weight": ("3e2", 300.0),
    "tv_weight": (".5", 0.5),
    "tv_power": ("1.5", 1.5),
    "tv_form": ("sum", "sum"),
    "content_layers": ("relu3_1", (("relu3_1", 1.0),)),
    "style_layers": ("relu1_1, relu2_1:.5", (("relu1_1", 1.0), ("relu2_1", 0.5))),
    "content_loss": ("sum", "sum"),
    "style_loss": ("shifted", "shifted"),
    "window": ("640", 640),
    "style_blend": ("3,1", (3.0, 1.0)),
    "style_scale": ("1.5,2", (1.5, 2.0)),
    "style_size": ("300", 300),
    "pixel_range": ("0-255", "0-255"),
    "pooling": ("max", "max"),
    "padding": ("zero", "zero"),
    "init": ("noise", "noise"),
    "init_noise": (".25", 0.25),
    "optimizer": ("adam", "adam"),
    "learning_rate": (".1", 0.1),
    "history": ("7", 7),
    "average": (".9", 0.9),
    "stop": ("1e-3", 1e-3),
    "seed": ("9", 9),
    "colour": ("match", "match"),
}


def test_every_config_option_reaches_the_config():
    assert {option.name for option in options()} - {"clamp", "tile"} == set(OPTIONS)
    for name, (text, value) in OPTIONS.items():
        config = stylize._config(stylize._parser().parse_args(["--" + name.replace("_", "-"), text]))
        assert getattr(config, name) == value != getattr(Config(), name)
        assert config == replace(Config(), **{name: value})
    given = stylize._parser().parse_args(["--content-layers", "auto"])
    assert stylize._config(given) == Config()
    given = stylize._parser().parse_args(["--size", "96x64"])
    assert stylize._config(given).size == (96, 64)
    assert stylize._config(stylize._parser().parse_args(["--iterations", "5,4,..."])).iterations == (5, 4, "...")


def test_device_precision_and_weights_reach_the_engine(pair, tmp_path, monkeypatch):
    content, style, out = pair
    seen = []
    engine = SimpleNamespace(device="onnxruntime")
    monkeypatch.setattr("engine.stylizer.Stylizer", lambda *given, **more: (seen.append((given, more)), engine)[1])
    monkeypatch.setattr(batches, "Stylizer", lambda *given, **more: seen.append((given, more)))
    for module, name in ((painting, "paint"), (batches, "paint"), (sheet, "make")):
        monkeypatch.setattr(module, name, lambda *given, **more: (0, ""))
    given = ["--weights", "w.pth", "--device", "onnxruntime", "--precision", "fp16"]
    assert stylize.main([content, style, "-o", out, *given]) == 0
    assert stylize.main([content, style, "-o", out, *given, "--grid", "seed=1,2"]) == 0
    assert stylize.main(["--contents", content, "--styles", style, "-o", str(tmp_path / "many"), *given]) == 0
    expected = ("w.pth", "onnxruntime", "fp16")
    assert seen[:2] == [(expected, {"keep_networks": False}), (expected, {"keep_networks": True})]
    assert seen[2] == ((*expected, None), {})


@pytest.mark.parametrize("name", ["clamp", "tile"])
def test_a_switch_can_be_turned_either_way(name):
    for flag, wanted in (([], getattr(Config(), name)), ([f"--{name}"], True), ([f"--no-{name}"], False)):
        assert getattr(stylize._config(stylize._parser().parse_args(flag)), name) is wanted


MISTAKES = [
    ([], "give CONTENT and STYLE"),
    (["{content}"], "give CONTENT and STYLE"),
    (["{content}", "{style}"], "-o OUT"),
    (["{content}", "{style}", "-o", "{out}", "--size", "big"], "--size big: give N"),
    (["{content}", "{style}", "-o", "{out}", "--size", "8"], "from 32"),
    (["{content}", "{style}", "-o", "{out}", "--style-layers", "relu1_1,rleu2_1"], "did you mean relu2_1"),
    (["{content}", "{style}", "-o", "{out}", "--pooling", "average"], "choose from avg, max"),
    (["{content}", "{style}", "-o", "{out}", "--optimizer", "lbgfs"], "did you mean lbfgs"),
    (["{content}", "{style}", "-o", "{out}", "--colour", "keep-bfore"], "did you mean keep-before"),
    (["{content}", "{style}", "-o", "{out}", "--device", "cudaa"], "did you mean cuda"),
    (["{content}", "{style}", "-o", "{out}", "--precision", "fp61"], "did you mean fp16"),
    (["{content}", "{style}", "-o", "{out}", "--device", "cpu", "--precision", "fp16"], "cpu has fp32 and bf16"),
    (["{content}", "{style}", "-o", "{out}", "--content-layers", "auto,relu1_1"], "layer 'auto'"),
    (["{content}", "{style}", "-o", "{out}", "--weights", "imagnet"], "did you mean imagenet? choose auto"),
    (["{content}", "{style}", "-o", "{out}", "--weights", "{missing}.pth"], "does not exist"),
    (["{content}", "{style}", "-o", "{out}", "--sizee", "64"], "unrecognized arguments: --sizee"),
    (["{content}", "{style}", "-o", "{out}", "--save-every", "0"], "from 1"),
    (["{missing}", "{style}", "-o", "{out}"], "No such file"),
    (["{empty}", "{style}", "-o", "{out}"], "is empty"),
    (["{text}", "{style}", "-o", "{out}"], "not a picture"),
    (["{content}", "{cut}", "-o", "{out}"], "damaged"),
    (["{thin}", "{style}", "-o", "{out}"], "crop it"),
    (["{folder}", "{style}", "-o", "{out}"], "give a folder, or a name that ends in .mp4"),
    (["{content}", "{style}", "-o", "{text}"], "--overwrite"),
    (["{content}", "{style}", "-o", "{content}"], "both a picture to read and OUT"),
    (["{content}", "{style}", "-o", "{out}", "--checkpoint", "{out}"], "both OUT and --checkpoint"),
    (["{content}", "{style}", "-o", "{folder}/a.bmp", "--trace", "{folder}/a.bmp.json"], "both OUT.json and --trace"),
    (["{content}", "{style}", "-o", "{out}", "--mask", "alpha:{text}", "--trace", "{text}"], "both a picture to read"),
    (["{content}", "{style}", "-o", "{out}", "--trace", "{text}"], "exists already; pass --overwrite"),
    (["{content}", "{style}", "-o", "{out}", "--plot", "{text}"], "exists already; pass --overwrite"),
    (["{content}", "{style}", "-o", "{out}", "--checkpoint", "{text}"], "exists already: --resume goes on from it"),
    (["{content}", "{style}", "-o", "{out}", "--checkpoint", "/dev/null"], "no ordinary file"),
    (["{content}", "{style}", "-o", "{folder}/f.png", "--save-every", "5"], "f-00010.png exists already"),
    (["{content}", "{style}", "-o", "{folder}/out.xyz"], "unknown picture format"),
    (["{content}", "{style}", "-o", "{missing}/out.png"], "not a folder"),
    (["{content}", "{style}", "-o", "{out}", "--init", "{missing}"], "No such file"),
    (["{content}", "{style}", "-o", "{out}", "--trace", "{missing}/t.json"], "not a folder"),
    (["{loop}", "{style}", "-o", "{out}"], "loop.png: Too many levels of symbolic links"),
    (["{content}", "{style}", "-o", "{loop}"], "loop.png: Too many levels of symbolic links"),
    (["-", "-", "-o", "{out}"], "only one picture"),
    (["{content}", "{style}", "-o", "{out}", "--init", "-", "--mask", "alpha:-"], "only one picture"),
    (["-", "{style}", "-o", "{out}", "--freeze", "-"], "only one picture"),
    (["{content}", "{style}", "-o", "{out}", "--grid", "init=noise,-"], "init - can be read for one picture only"),
    (["--contents", "{content}", "--styles", "{style}", "-o", "{out}s", "--init", "-"], "for one picture only"),
    (["none", "none", "-o", "{out}"], "with neither"),
    (["{content}", "{style}", "none", "-o", "{out}"], "give it alone"),
    (["{content}", "{style}", "-o", "{out}", "--size", "64x48"], "without content"),
    (["none", "{style}", "-o", "{out}", "--size", "64xbig"], "give N|original|WxH"),
    (["{content}", "{style}", "-o", "{out}", "--style-blend", "1,2"], "2 weights, there are 1 styles"),
    (["{content}", "{style}", "-o", "{out}", "--style-loss", "gramm"], "did you mean gram"),
    (["{content}", "{style}", "-o", "{out}", "--style-size", "9"], "from 32"),
    (["{content}", "{style}", "-o", "{out}", "--mask", "alpha"], "no alpha channel"),
    (["{content}", "{style}", "-o", "{out}", "--mask", "{content}:{missing}"], "No such file"),
    (["{content}", "{missing}.safetensors", "-o", "{out}"], "No such file"),
    (["{content}", "{style}", "--demo"], "leave CONTENT"),
    (["{content}.safetensors", "{style}", "-o", "{out}"], "style targets take the place of a STYLE"),
    (
        ["--contents", "{content}", "--styles", "{style}", "-o", "{out}s", "--demo"],
        "leave CONTENT, STYLE and --demo out",
    ),
    (["{content}", "{style}", "-o", "-", "--save-every", "5"], "not a pipe"),
    (["{content}", "{style}", "-o", "{out}", "--checkpoint-every", "5"], "--checkpoint-every is for --checkpoint"),
    (["{content}", "{style}", "-o", "{out}", "--style-scale", "64"], "give less"),
    (["{content}", "{style}", "-o", "{out}", "--grid", "seed=1,2", "seed=3"], "names seed twice"),
    (["{content}", "{style}", "-o", "{out}", "--grid", "seed=" + ",".join(map(str, range(401)))], "more than 400"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(m[0][-2:]) or "nothing" for m in MISTAKES])
def test_mistakes_exit_2_with_one_line_and_leave_nothing(pair, tmp_path, capsys, arguments, words):
    content, style, out = pair
    places = {"content": content, "style": style, "out": out, "missing": str(tmp_path / "missing")}
    for name, data in {"empty": b"", "text": b"hello" * 99, "cut": Path(content).read_bytes()[:90]}.items():
        places[name] = str(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.png").write_bytes(data)
    Image.fromarray(np.zeros((300, 1, 3), np.uint8)).save(tmp_path / "thin.png")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "f-00010.png").touch()
    (tmp_path / "loop.png").symlink_to("loop.png")
    places |= {name: str(tmp_path / f"{name}.png") for name in ("thin", "loop")} | {"folder": str(tmp_path / "folder")}
    before = sorted(tmp_path.rglob("*"))
    try:
        status = stylize.main([argument.format(**places) for argument in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert words in captured.err
    assert captured.err.startswith("engine.stylize: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_frames_that_are_there_are_replaced_only_if_that_is_meant(tmp_path):
    for name in ("out-00004.png", "out-4.png", "out-00006.jpg", "other-00006.png"):
        (tmp_path / name).touch()
    out = str(tmp_path / "out.png")
    painting.check_frames(out, 3)
    with pytest.raises(ValueError, match=r"out-00004\.png exists already"):
        painting.check_frames(out, 2)


def test_options_may_stand_between_the_pictures(pair, monkeypatch):
    content, style, out = pair
    seen = []
    engine = SimpleNamespace(device="onnxruntime")
    monkeypatch.setattr("engine.stylizer.Stylizer", lambda *arguments, **options: engine)
    monkeypatch.setattr(painting, "paint", lambda _, job, *others: (seen.append(job), (0, ""))[1])
    assert stylize.main([content, "-o", out, style, "--size", "64", content]) == 0
    assert [each.name for each in (seen[0].content, *seen[0].styles)] == ["content.png", "style.png", "content.png"]
    monkeypatch.chdir(Path(content).parent)
    Path("-c.png").write_bytes(Path(content).read_bytes())
    assert stylize.main(["--size", "64", "-o", out, "--", "-c.png", style]) == 0
    assert seen[1].content.name == "-c.png"
    assert stylize.main([content, style, "-o", content, "--overwrite"]) == 0  # it is read before it is replaced


def test_a_closed_stderr_says_nothing_elsewhere(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert jobs.fail("program", 3, "it broke") == 3
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("code", "status"),
    [(errno.EROFS, 2), (errno.ENAMETOOLONG, 2), (errno.EACCES, 2), (errno.ENOSPC, 1), (errno.EIO, 1)],
)
def test_a_name_that_cannot_be_used_is_a_mistake_and_a_full_disk_is_none(pair, monkeypatch, capsys, code, status):
    def fails(*arguments):
        raise OSError(code, "so it is", "out.png")

    monkeypatch.setattr(image, "check_output", fails)
    assert stylize.main([*pair[:2], "-o", pair[2], *SMALL]) == status
    assert "out.png: so it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--color", "match"], "did you mean --colour?"),
        (["--style_weight", "3"], "did you mean --style-weight?"),
        (["--xyzzy"], "--help lists the options"),
        (["--device", "gpu"], "did you mean cudnn?"),
        (["--init", "nois"], "did you mean noise?"),
        (["-o", "."], ". is a folder: give a file in it"),
    ],
)
def test_what_was_meant_is_guessed(pair, capsys, words, said):
    content, style, out = pair
    try:
        status = stylize.main([content, style, "-o", out, *SMALL, *words])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err


def refuse(*given, **options):
    raise RuntimeError("not now")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--learning-rate", "0.1", "--seed", "3"], ["--seed", "--learning-rate"]),
        (["--optimizer", "adam", "--history", "7", "--clamp"], ["--history", "--clamp"]),
        (["--tv-power", "1", "--tv-form", "sum", "--init", "noise", "--init-noise", "1"],
         ["--init-noise", "--tv-power", "--tv-form"]),
        (["--tv-power", "1", "--tv-weight", "1", "--init-noise", "0.1", "--seed", "1", "--history", "3"], []),
        (["--grid", "seed=1,2", "tv-power=1,2"], ["--seed", "--tv-power"]),
        (["--grid", "init=content,noise", "seed=1,2", "tv-weight=0,1", "--tv-power", "1"], []),
        (["--preset", "pystiche"], []),
        (["--content-weight", "0", "--content-layers", "relu1_1", "--content-loss", "sum"],
         ["--content-layers", "--content-loss"]),
        (["--style-weight", "0", "--style-layers", "relu1_1", "--style-size", "64"],
         ["--style-layers", "--style-size"]),
        (["--style-blend", "3"], ["--style-blend"]),
        (["--style-weight", "0", "--colour", "match", "--init", "content"], ["--colour"]),
        (["--style-weight", "0", "--colour", "match", "--init", "style"], []),
        (["--style-weight", "0", "--colour", "keep-after"], []),
        (["--style-weight", "0", "--style-size", "64", "--save-targets", "{out}.safetensors"], []),
        (["--tile", "--padding", "reflect"], []),
    ],
)  # fmt: skip
def test_options_without_effect_are_named(pair, caplog, monkeypatch, arguments, told):
    monkeypatch.setattr("engine.stylizer.Stylizer", refuse)
    assert stylize.main([*pair[:2], "-o", pair[2], *(each.format(out=pair[2]) for each in arguments)]) == 1
    assert [each.message.partition(" ")[0] for each in caplog.records if "no effect" in each.message] == told
    assert "style_blend" not in Config(style_weight=0, init="style", style_blend=(3, 1)).idle(content=True, styles=2)


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        (("none", "style"), ["--content-weight", "--content-layers"]),
        (("content", "none"), ["--style-weight", "--style-layers", "--style-size", "--style-blend", "--padding"]),
    ],
)
def test_weights_of_what_is_not_there_are_named(pair, caplog, monkeypatch, sources, told):
    monkeypatch.setattr("engine.stylizer.Stylizer", refuse)
    own = [each if each == "none" else pair[each == "style"] for each in sources]
    own += ["--style-blend", "1"] if sources[1] == "none" else []
    own += ["--tile", "--padding", "zero"]
    own += ["--content-weight", "2", "--content-layers", "relu1_1", "--style-weight", "2", "--style-layers", "relu1_1"]
    assert stylize.main([*own, "--style-size", "64", "--init", "noise", "--seed", "1", "-o", pair[2]]) == 1
    assert [each.message.partition(" ")[0] for each in caplog.records if "no effect" in each.message] == told


@pytest.mark.parametrize("sources", [("none", "style"), ("content", "none")])
def test_a_start_from_a_content_that_is_not_there_is_named(pair, caplog, monkeypatch, sources):
    monkeypatch.setattr("engine.stylizer.Stylizer", refuse)
    own = [each if each == "none" else pair[each == "style"] for each in sources]
    assert stylize.main([*own, "-o", pair[2], "--init", "content", "--init-noise", "0.1", "--seed", "1"]) == 1
    told = [each.message.partition(" ")[0] for each in caplog.records if "no effect" in each.message]
    assert told == ["--init", "--init-noise"]


def test_nothing_is_written_for_a_run_that_cannot_begin(pair, tmp_path):
    content, style, out = pair
    kept = tmp_path / "kept.safetensors"
    words = [content, style, "-o", out, *SMALL, "--save-targets", str(kept)]
    assert stylize.main([*words, "--style-blend", "1,2"]) == 2
    assert not kept.exists()
    assert stylize.main(words) == 0
    assert kept.exists()


def test_a_preset_for_other_weights_is_warned_of(pair, states, caplog, monkeypatch):
    content, style, out = pair
    for module in (painting, batches):
        monkeypatch.setattr(module, "paint", lambda *given, **options: (0, ""))
    single, several = [content, style, "-o", out], ["--contents", content, "--styles", style, "-o", f"{out}.d"]
    caffe, torchvision = (str(states[naming][0]) for naming in ("caffe", "torchvision"))
    for weights, preset, made_for in (
        ("embedded", "gatys2016", "caffe"),
        ("embedded", "pystiche", "imagenet"),
        (caffe, "gatys2016", None),
        (caffe, "pystiche", "imagenet"),
        (torchvision, "pystiche", None),
        (torchvision, "neural-style", "caffe"),
    ):
        for sources in (single, several):
            caplog.clear()
            options = ["--preset", preset, "--weights", weights, "--device", "cpu", "--size", "48"]
            assert stylize.main([*sources, *options]) == 0
            told = [each.message for each in caplog.records if each.message.startswith("preset")]
            assert [message.split()[5] for message in told] == [made_for] * (made_for is not None)


def test_sigterm_is_taken_for_ctrl_c(pair, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(painting, "paint", lambda *given: signal.raise_signal(signal.SIGTERM))
    assert stylize.main([*pair[:2], "-o", pair[2], *SMALL]) == 130
    assert capsys.readouterr().err.endswith("engine.stylize: interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_what_ignores_ctrl_c(pair, monkeypatch, capsys):
    """As shells have their background jobs do."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(painting, "paint", lambda *given: signal.raise_signal(signal.SIGTERM))
        assert stylize.main([*pair[:2], "-o", pair[2], *SMALL]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.endswith("engine.stylize: interrupted\n")


def test_a_drive_is_no_style_mask(monkeypatch):
    assert stylize._masks(["m:/s.png", "m:s"]) == [("m", "/s.png"), ("m", "s")]
    monkeypatch.setattr(sys, "platform", "win32")
    masks = {
        r"C:\m.png:D:\s.png": (r"C:\m.png", r"D:\s.png"),
        "C:/m.png": "C:/m.png",
        "m.png:C:/s.png": ("m.png", "C:/s.png"),
        "m:s": ("m", "s"),
        "a:b:alpha": ("a:b", "alpha"),
        ":": ":",
    }
    assert stylize._masks(list(masks)) == list(masks.values())


def test_a_warning_is_told_once(capsys):
    log, handler = logging.getLogger("once"), logging.StreamHandler()
    handler.addFilter(stylize._Once())
    log.addHandler(handler)
    for level in (logging.WARNING, logging.ERROR, logging.WARNING):
        log.log(level, "no %s", "alpha")
    for _ in range(2):
        log.warning("no profile")
    assert capsys.readouterr().err.splitlines() == ["no alpha", "no profile"]


TEXTS = st.text(max_size=12) | st.sampled_from(
    ["nan", "-1", "1e999", "9" * 5000, "auto", "original", ",", "relu1_1,", "\0"]
)


@settings(max_examples=150)
@given(st.lists(st.tuples(st.sampled_from(sorted(stylize._METAVARS)), TEXTS), max_size=3))
def test_any_text_for_any_option_is_a_run_or_one_line(options):
    """The content does not exist, so that no run starts: exit 2, whatever the options say."""
    arguments = ["--{}={}".format(name.replace("_", "-"), text) for name, text in options]
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            status = stylize.main(["missing-content.png", "style.png", "-o", "missing-out.png", *arguments])
        except SystemExit as stop:
            status = stop.code
    assert status == 2
    assert err.getvalue().startswith("engine.stylize: ")
    assert err.getvalue().count("\n") == 1
    assert not Path("missing-out.png").exists()


def test_size_original_is_the_contents_own(pair):
    content, style, out = pair
    assert stylize.main([content, style, "-o", out, "--size", "original", *SMALL[2:]]) == 0
    with Image.open(out) as picture, Image.open(content) as own:
        assert picture.size == own.size


def test_limits_come_from_the_environment(pair, capsys, monkeypatch):
    content, style, out = pair
    for name, words in {"STYLIZE_MAX_PIXELS": "more than 64 pixels", "STYLIZE_MAX_BYTES": "more than 64 bytes"}.items():
        with monkeypatch.context() as patch:
            patch.setenv(name, "64")
            assert stylize.main([content, style, "-o", out, *SMALL]) == 2
        assert words in capsys.readouterr().err
    assert not Path(out).exists()


def test_existing_output_needs_overwrite(pair):
    content, style, out = pair
    Path(out).touch()
    assert stylize.main([content, style, "-o", out, *SMALL]) == 2
    assert stylize.main([content, style, "-o", out, "--overwrite", *SMALL]) == 0
    with Image.open(out) as picture:
        assert picture.size == (48, 34)


def test_pipes(pair):
    content, style, _ = pair
    done = run("-", style, "-o", "-", *SMALL, input=Path(content).read_bytes())
    assert done.returncode == 0, done.stderr
    assert Image.open(io.BytesIO(done.stdout)).size == (48, 34)


def test_trace_and_saved_steps(pair, tmp_path, stylizer):
    content, style, out = pair
    trace = tmp_path / "trace.json"
    arguments = [content, style, "-o", out, *SMALL, "--trace", str(trace), "--save-every", "2", "--quiet"]
    assert stylize.main(arguments) == 0
    record = json.loads(trace.read_text())
    assert record["config"]["size"] == 48
    assert (record["device"], record["precision"], record["weights"]) == ("cpu", stylizer.precision, "embedded")
    assert [row["iteration"] for row in record["steps"]] == [1, 2, 3]
    assert all(row["scale"] == 48 and row["loss"] > 0 and row["seconds"] > 0 for row in record["steps"])
    for row in record["steps"]:
        assert set(row["stages"]) == {"forward", "losses", "cotangents", "vjp", "optimiser"}
        assert all(seconds > 0 for seconds in row["stages"].values())
    assert sum(sum(row["stages"].values()) for row in record["steps"]) < record["steps"][-1]["seconds"]
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out-00002.png", "out.png"]
    _, wanted, last = (step.image.tobytes() for step in stylizer.steps(content, style, Config(**SMALL_CONFIG)))
    with Image.open(tmp_path / "out-00002.png") as frame, Image.open(out) as whole:
        assert (frame.tobytes(), whole.tobytes()) == (wanted, last)
    assert wanted != last


def test_quiet_says_nothing(pair):
    content, style, out = pair
    done = run(content, style, "-o", out, *SMALL, "--quiet", "--progress", "json")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_demo_uses_the_bundled_pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stylize.main(["--demo", *SMALL, "--iterations", "1"]) == 0
    with Image.open("demo.png") as picture:
        assert picture.size == (48, 32)


def test_ctrl_c_keeps_the_picture_so_far(pair, tmp_path):
    content, style, out = pair
    trace = tmp_path / "trace.json"
    command = [sys.executable, "-m", "engine.stylize", content, style, "-o", out, "--trace", str(trace)]
    options = ["--size", "64", "--scales", "1", "--iterations", "100000", "--weights", "embedded", "--save-every", "5"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out-00005.png").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; the picture so far is in" in err
    assert "Traceback" not in err
    with Image.open(out) as picture:
        assert picture.size == (64, 46)
    assert len(json.loads(trace.read_text())["steps"]) >= 5


def test_a_run_that_breaks_keeps_the_last_good_picture_and_exits_1(pair, capsys, monkeypatch, stylizer):
    from engine import losses

    content, style, out = pair
    start, good, _ = (step.image.tobytes() for step in stylizer.steps(content, style, Config(**SMALL_CONFIG)))
    write, calls = losses.Objective.write, []

    def breaks(self, *arguments):
        calls.append(1)
        return write(self, *arguments) * (float("nan") if len(calls) == 3 else 1)

    monkeypatch.setattr(losses.Objective, "write", breaks)
    assert stylize.main([content, style, "-o", out, *SMALL]) == 1
    assert "not finite, after iteration 2: try smaller weights" in capsys.readouterr().err
    with Image.open(out) as picture:
        assert np.asarray(picture).std() > 0
        assert picture.tobytes() == good != start


def test_a_full_disk_is_the_machines_fault(pair, capsys, monkeypatch):
    from engine import image

    def full(*arguments):
        raise OSError(28, "No space left on device", "out.png")

    content, style, out = pair
    monkeypatch.setattr(image, "save", full)
    assert stylize.main([content, style, "-o", out, *SMALL]) == 1
    assert capsys.readouterr().err.strip().endswith("out.png: No space left on device")


def test_texture_and_its_saved_targets(pair, tmp_path):
    content, style, out = pair
    options = ["--iterations", "2", "--scales", "1", "--style-layers", "relu1_1,relu2_1", "--size"]
    kept = str(tmp_path / "style.safetensors")
    assert stylize.main(["none", style, "-o", out, *options, "64x40", "--save-targets", kept, "--quiet"]) == 0
    with Image.open(out) as image:
        assert image.size == (64, 40)
        first = image.tobytes()
    again = str(tmp_path / "again.png")
    assert stylize.main(["none", kept, "-o", again, *options, "64x40", "--quiet"]) == 0
    with Image.open(again) as image:
        assert image.tobytes() == first
    own = ["--iterations", "1", "--scales", "1", "--size", "original", "--overwrite", "--quiet", "--save-targets", kept]
    assert stylize.main([content, style, "-o", out, *own]) == 0  # at the content's own size
    with Image.open(content) as image:
        assert list(Targets.load(kept).sides) == [max(image.size)]
    assert stylize.main([content, style, "-o", out, *own, "--colour", "match"]) == 2
    inverted = str(tmp_path / "inverted.png")
    assert stylize.main([content, "none", "-o", inverted, *options, "48", "--init", "noise", "--quiet"]) == 0
    with Image.open(inverted) as image:
        assert max(image.size) == 48


def test_what_is_read_from_a_pipe_is_read_once(pair, monkeypatch):
    content, style, out = pair
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(Path(content).read_bytes())))
    assert stylize.main([content, style, "-o", out, *SMALL, "--freeze", "-"]) == 0


def test_masks_and_freeze_reach_the_run(pair, tmp_path, monkeypatch):
    content, style, out = pair
    seen = {}

    def steps(self, content, style, config, *, masks, freeze, resume):
        seen.update(masks=masks, freeze=freeze, blend=config.style_blend)
        return iter(())

    monkeypatch.setattr("engine.stylizer.Stylizer.steps", steps)
    masks = ["--mask", f"{content}:{style}", "--mask", "alpha", "--freeze", content, "--style-blend", "3,1"]
    assert stylize.main([content, style, style, "-o", out, *masks]) == 0
    assert seen == {"masks": [(content, style), "alpha"], "freeze": content, "blend": (3.0, 1.0)}
