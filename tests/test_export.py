import numpy as np
import onnx
import pytest

from engine.export import __main__ as command
from engine.export import graph, validate, vgg, weights
from engine.export.ort import onnxruntime


def test_writes_validated_files_and_prints_a_table(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "new"), "--height", "40", "--width", "37", "--layers", "relu1_1,relu2_1"]
    assert command.main([*arguments, "--weights", "embedded"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert [word for word in ("file", "inputs", "outputs", "opset", "size", "max error") if word in head]
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert [row.split()[0] for row in sorted(rows)] == files
    for kind in ("forward", "vjp"):
        (path,) = (tmp_path / "new").glob(f"{kind}-*-relu2_1-avg-fp32-*-40x37.onnx")
        onnx.checker.check_model(str(path), full_check=True)


def test_exports_of_one_depth_stand_side_by_side(tmp_path, monkeypatch, states):
    """Other loss layers, other weights."""
    monkeypatch.setattr(command, "DEFAULT_LAYERS", ("relu1_1", "conv1_2"))
    for layers, source in (("conv1_2,relu1_1", "embedded"), ("conv1_2", "embedded"), ("conv1_2", states["caffe"][0])):
        command.export(vgg.Spec(33, 34, tuple(layers.split(","))), weights.load(source, ("conv1_2",)), tmp_path)
    names = sorted(path.name for path in tmp_path.glob("forward-*.onnx"))
    assert len(names) == 3
    (plain,) = (name for name in names if name.endswith("-relu1_2-avg-fp32-33x34.onnx"))
    assert (tmp_path / plain.replace("forward-", "").replace("-33x34.onnx", ".bin")).exists()
    assert len(list(tmp_path.glob("*.bin"))) == 2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_writes_16_bit_files(tmp_path, precision):
    arguments = [
        "--out",
        str(tmp_path),
        "--height",
        "33",
        "--width",
        "34",
        "--layers",
        "relu2_1",
        "--precision",
        precision,
    ]
    assert command.main([*arguments, "--weights", "embedded"]) == 0
    for kind in ("forward", "vjp"):
        (path,) = tmp_path.glob(f"{kind}-*-relu2_1-avg-{precision}-*-33x34.onnx")
        onnx.checker.check_model(str(path), full_check=True)


def test_written_files_compute_the_same_as_the_engine(tmp_path):
    spec = vgg.Spec(33, 40, ("relu1_2", "relu2_1"))
    net = weights.load("embedded", spec.layers)
    command.export(spec, net, tmp_path)
    random = np.random.default_rng(0)
    given = {"image": random.random((1, 3, 33, 40), np.float32)}
    forward = graph.forward(spec, net), graph.forward_initializers(spec, net)
    vjp = graph.vjp(spec, net), graph.vjp_initializers(spec, net)
    for kind, pair in (("forward", forward), ("vjp", vjp)):
        (path,) = tmp_path.glob(f"{kind}-*.onnx")
        session = onnxruntime().InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        assert {each.name for each in session.get_inputs()} == set(given)
        from_file = dict(zip(names, session.run(None, given), strict=True))
        in_memory = validate.run(*pair, given)
        for name, value in from_file.items():
            np.testing.assert_array_equal(value, in_memory[name])
        wanted = {each.name for each in vjp[0].graph.input}
        given = {name: value for name, value in from_file.items() if name in wanted}
        cotangents = {
            name: random.standard_normal(from_file[name].shape, np.float32) for name in spec.layers if name in given
        }
        given |= {f"cotangent.{name}": value for name, value in cotangents.items()}
    assert list(from_file) == ["gradient"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "relu9_1"], "layer 'relu9_1' is unknown: did you mean relu"),
        (["--height", "8"], "at least 32"),
        (["--weights", "missing.pth"], "does not exist"),
        (["--weights", "imagnet"], "did you mean imagenet? choose auto"),
        (["--pooling", "averge"], "pooling 'averge' is unknown: did you mean avg?"),
        (["--padding", "reflekt"], "did you mean reflect?"),
        (["--precision", "fp8"], "choose from fp32"),
    ],
)
def test_mistakes_exit_2_with_one_line(tmp_path, capsys, arguments, words):
    assert command.main(["--out", str(tmp_path), *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_a_size_beyond_the_memory_is_one_line(tmp_path, capsys):
    words = ["--height", "1000000", "--width", "1000000", "--layers", "relu1_1", "--weights", "embedded"]
    assert command.main(["--out", str(tmp_path), *words]) == 1
    err = capsys.readouterr().err
    assert "memory" in err
    assert err.count("\n") == 1


def test_an_interrupt_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load", interrupted)
    assert command.main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "engine.export: interrupted\n"


def test_an_option_that_does_not_exist_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(["--out", str(tmp_path), "--pading", "zero"])
    said = "engine.export: unrecognized arguments: --pading zero (did you mean --padding?)\n"
    assert capsys.readouterr().err == said


def test_a_graph_that_is_off_is_not_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(validate, "TOLERANCE", {"fp32": (1e-5, 1e-12)})
    arguments = ["--out", str(tmp_path), "--height", "32", "--width", "32", "--layers", "relu1_1"]
    assert command.main([*arguments, "--weights", "embedded"]) == 1
    assert "is off by" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
