"""A resumed run is the uninterrupted one, bit for bit; what does not fit is refused."""

import dataclasses
import itertools
import json
import weakref

import numpy as np
import pytest
import torch
from conftest import SHALLOW
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine import Config, Stylizer, kernels, losses, optimize
from engine import stylizer as module
from engine.checkpoint import Checkpoint, dump, load, note
from engine.export.weights import load as load_weights
from engine.goal import load as load_goal
from engine.optimize import State, minimise

SMALL = {"size": 64, "scales": 2, "iterations": (4, 3), "style_layers": SHALLOW}


def everything(steps):
    return [(step.scale, step.iteration, step.total, step.loss, step.image.tobytes()) for step in steps]


def interrupted(stylizer, pictures, config, cut):
    """The checkpoint after `cut` iterations of a run that is then left."""
    steps = stylizer.steps(pictures["content"], pictures["style"], config)
    for step in steps:
        if step.iteration == cut:
            data = step.checkpoint()
            steps.close()
            assert step.checkpoint() == data  # a run that was left at a step stays there
            return data
    raise AssertionError("the run is shorter")


def test_a_checkpoint_of_a_file_is_that_of_bytes(stylizer, pictures, tmp_path):
    steps = stylizer.steps(pictures["content"], pictures["style"], Config(**SMALL))
    step, path = next(steps), tmp_path / "run.ckpt"
    step.save_checkpoint(path, {"a": 1})
    assert path.read_bytes() == step.checkpoint({"a": 1})
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
    taken = sum(tensor.nbytes for tensor in load(step.checkpoint()).tensors.values())
    step.save_checkpoint(path, room=taken)
    other = tmp_path / "other"
    with pytest.raises(OSError, match="No space left"):
        step.save_checkpoint(other, room=taken - 1)
    assert not other.exists()
    with pytest.raises(OSError, match="No such file"):
        step.save_checkpoint(tmp_path / "missing" / "run.ckpt")
    next(steps)
    with pytest.raises(RuntimeError, match="moved on"):
        step.save_checkpoint(path)


@pytest.mark.parametrize(
    "options",
    [{"init": "noise"}, {"optimizer": "adam"}, {"style_loss": "wasserstein", "style_layers": ("relu3_1", "relu5_1")}],
)
def test_a_resumed_run_is_the_uninterrupted_one(stylizer, pictures, options):
    config = Config(**SMALL | options)
    pair = pictures["content"], pictures["style"]
    expected = everything(stylizer.steps(*pair, config))
    fresh = Stylizer(weights="embedded", device="cpu", threads=2)  # nor does the number of threads matter
    for cut in (2, 4, 5):  # 4 is the end of the first scale
        data = interrupted(stylizer, pictures, config, cut)
        assert everything(fresh.steps(*pair, config, resume=data)) == expected[cut:]


RUNS = [
    {"average": 0.8},
    {"average": 0.8, "optimizer": "adam", "init": "style"},
    {"stop": 1.0, "iterations": (8, 7)},
    {"stop": 1.0, "iterations": (8, 7), "optimizer": "adam", "average": 0.5},
    {"clamp": True, "history": 2, "tile": True, "init_noise": 0.2},
]


@pytest.mark.parametrize("options", RUNS, ids=lambda options: "-".join(options))
def test_a_resumed_run_keeps_its_average_its_stall_and_its_totals(stylizer, pictures, monkeypatch, options):
    """Cut in the middle of scales, at the end of the first one, and after the only step of the last."""
    monkeypatch.setattr(optimize, "WINDOW", 5)
    config = Config(**SMALL | options)
    pair = pictures["content"], pictures["style"]
    expected = everything(stylizer.steps(*pair, config))
    first = sum(scale == expected[0][0] for scale, *_ in expected)
    assert first < config.iterations[0] or "stop" not in options
    assert expected[-1][1] == expected[-1][2] == len(expected)
    for cut in (2, first - 1, first, first + 1, len(expected) - 1):
        data = interrupted(stylizer, pictures, config, cut)
        assert everything(stylizer.steps(*pair, config, resume=data)) == expected[cut:]
    data = interrupted(stylizer, pictures, config, len(expected))
    with pytest.raises(ValueError, match="finished"):
        stylizer.steps(*pair, config, resume=data)


def test_the_last_step_of_a_scale_that_stopped_lets_go_of_the_optimiser(stylizer, pictures):
    config = Config(**SMALL | {"stop": 1.0, "iterations": (30, 28)})
    steps = list(stylizer.steps(pictures["content"], pictures["style"], config))
    assert len(steps) < 58
    assert not any(step._iterate._saving for step in steps)


def test_a_resumed_run_lets_go_of_its_checkpoint(stylizer, pictures, monkeypatch):
    """A history as long as its own."""
    pair, config = (pictures["content"], pictures["style"]), Config(size=48, scales=1, iterations=6)
    data = interrupted(stylizer, pictures, config, 3)
    tensors, held, write = [], [], losses.Objective.write

    def noted(data):
        found = load(data)
        tensors.append(weakref.ref(found.tensors["history"]))
        return found

    def looking(self, *given):
        held.append(tensors[0]() is not None)
        return write(self, *given)

    monkeypatch.setattr(module, "load_checkpoint", noted)
    monkeypatch.setattr(losses.Objective, "write", looking)
    assert len(list(stylizer.steps(*pair, config, resume=data))) == 3
    assert held == [False] * 3


def test_taking_checkpoints_changes_nothing_and_one_may_follow_another(stylizer, pictures):
    config = Config(**SMALL)
    pair = pictures["content"], pictures["style"]
    expected = everything(stylizer.steps(*pair, config))
    found, data = [], None
    for _ in range(len(expected)):
        steps = stylizer.steps(*pair, config, resume=data)
        step = next(steps)
        data = step.checkpoint()
        found += everything([step])
    assert found == expected


def rosenbrock(image, gradient):
    """A narrow curved valley over pairs of values."""
    flat, out = image.view(-1, 2), gradient.view(-1, 2)
    x, y = flat[:, 0], flat[:, 1]
    out[:, 0] = -400 * x * (y - x * x) - 2 * (1 - x)
    out[:, 1] = 200 * (y - x * x)
    return (100 * (y - x * x) ** 2 + (1 - x) ** 2).sum()


def cliff(image, gradient):
    """Its gradient says nothing of the wall behind 0.3: steps are halved, and L-BFGS starts afresh."""
    gradient.fill_(-1)
    return (1 - image).sum() + 1e4 * (image - 0.3).clamp(min=0).sum()


@pytest.mark.parametrize("function", [rosenbrock, cliff])
@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_every_cut_of_a_minimisation(function, optimizer, monkeypatch):
    """More iterations than the history has pairs; with the cliff, cuts between halvings and after a fresh start."""
    actions = []
    decide = kernels.lbfgs.decide
    monkeypatch.setattr(kernels.lbfgs, "decide", lambda *a: (actions.append(decide(*a)), actions[-1])[1])
    start, count = torch.full((1, 3, 2, 2), -0.2), 40
    whole = [
        (each.loss, each.best.clone()) for each in minimise(function, start, optimizer, count, State(), history=20)
    ]
    if optimizer == "lbfgs" and function is cliff:
        assert {kernels.lbfgs.HALVE, kernels.lbfgs.RESTART} <= set(actions)
    for cut in range(1, count):
        iterates = minimise(function, start, optimizer, count, State(), history=20)
        for _ in range(cut):
            iterate = next(iterates)
        saved = {name: tensor.clone() for name, tensor in iterate.save().items()}
        rest = list(minimise(function, start * 0, optimizer, count - cut, State(), saved, history=20))
        assert [each.loss for each in rest] == [loss for loss, _ in whole[cut:]]
        assert all(torch.equal(each.best, best) for each, (_, best) in zip(rest, whole[cut:], strict=True))


def test_iterations_that_a_gpu_was_given_come_first():
    """What a GPU had computed ahead of the iterate that was saved is handed out before anything is evaluated."""
    start, count = torch.full((1, 3, 2, 2), -0.2), 8
    whole = [(each.loss, each.best.clone()) for each in minimise(rosenbrock, start, "lbfgs", count, State())]
    iterates = minimise(rosenbrock, start, "lbfgs", count, State())
    saved = [{n: t.clone() for n, t in next(iterates).save().items()} for _ in range(5)][-1]
    saved["queued.losses"] = torch.tensor([loss for loss, _ in whole[3:5]])
    saved["queued.best"] = torch.stack([best for _, best in whole[3:5]])
    rest = list(minimise(rosenbrock, start, "lbfgs", count - 3, State(), saved))
    assert [each.loss for each in rest] == [loss for loss, _ in whole[3:]]


def test_a_checkpoint_is_refused_once_the_run_has_moved_on(stylizer, pictures):
    steps = stylizer.steps(pictures["content"], pictures["style"], Config(**SMALL))
    first = next(steps)
    next(steps)
    with pytest.raises(RuntimeError, match="before the next step"):
        first.checkpoint()
    last = list(steps)[-1]
    with pytest.raises(RuntimeError, match="before the next step"):
        last.checkpoint()


def test_a_kept_step_keeps_no_optimiser(stylizer, pictures):
    steps = list(stylizer.steps(pictures["content"], pictures["style"], Config(**SMALL)))
    assert not any(step._iterate._saving for step in steps)


OTHERS = [
    ({"style_weight": 10.0}, r"another style-weight \(10000.0, here 10.0\)$"),
    ({"seed": 3}, r"another seed \(0, here 3\)$"),
    ({"iterations": (4, 5)}, "another iterations$"),
    ({"optimizer": "adam"}, r"another optimizer \(lbfgs, here adam\)$"),
]


@pytest.mark.parametrize(("changes", "words"), OTHERS, ids=lambda value: str(value))
def test_other_options_are_refused(stylizer, pictures, changes, words):
    data = interrupted(stylizer, pictures, Config(**SMALL), 2)
    with pytest.raises(ValueError, match=words):
        stylizer.steps(pictures["content"], pictures["style"], Config(**SMALL | changes), resume=data)


def test_other_pictures_weights_and_devices_are_refused(exact, pictures, states, tmp_path):
    content, style, config = pictures["content"], pictures["style"], Config(**SMALL)
    data = interrupted(exact, pictures, config, 2)
    with pytest.raises(ValueError, match=r"another content$"):
        exact.steps(content[::-1].copy(), style, config, resume=data)
    with pytest.raises(ValueError, match=r"another style$"):
        exact.steps(content, [style, style], config, resume=data)
    with pytest.raises(ValueError, match=r"another weights$"):
        Stylizer(states["torchvision"][0], "cpu", "fp32").steps(content, style, config, resume=data)
    with pytest.raises(ValueError, match=r"another precision \(fp32, here bf16\)$"):
        Stylizer("embedded", "cpu", "bf16").steps(content, style, config, resume=data)
    with pytest.raises(ValueError, match=r"another device \(cpu, here onnxruntime\)$"):
        Stylizer(weights="embedded", device="onnxruntime").steps(content, style, config, resume=data)
    start = tmp_path / "start.png"
    Image.fromarray(content).save(start)
    data = interrupted(exact, pictures, Config(**SMALL, init=start), 2)
    moved = start.rename(tmp_path / "moved.png")
    assert next(exact.steps(content, style, Config(**SMALL, init=moved), resume=data)).iteration == 3
    Image.fromarray(style).save(moved)
    with pytest.raises(ValueError, match=r"another init$"):
        exact.steps(content, style, Config(**SMALL, init=moved), resume=data)


def test_other_masks_are_refused(pictures):
    left, part = np.zeros((40, 56), np.float32), np.ones((44, 36), np.float32)
    left[:, :28] = part[:20] = 1
    part[20:] = 0
    given = [(None, None), (left, None), (1 - left, None), ((left, part), None), (None, left), (None, 1 - left)]
    pair = pictures["content"], pictures["style"]
    found = [load_goal(*pair, Config(), None if mask is None else [mask], freeze).digests() for mask, freeze in given]
    for one, other in itertools.combinations(found, 2):
        differing = [name for name in ("freeze", "mask") if one[name] != other[name]]
        with pytest.raises(ValueError, match="of a run with another " + ", another ".join(differing)):
            Checkpoint(one, 0, 1, {}).check(other)


def test_the_identity_of_the_weights_is_that_of_the_layers_in_use(stylizer):
    """However many convolutions were loaded."""
    shallow, deep = (load_weights("embedded", (layer,)).digests for layer in ("relu2_1", "relu3_1"))
    assert shallow[:3] == deep[:3]
    assert shallow[2] != deep[4]
    assert stylizer.weights_digest(("relu2_1", "relu1_1")) == shallow[2]


def test_a_finished_run_is_refused(stylizer, pictures):
    data = interrupted(stylizer, pictures, Config(**SMALL), 7)
    with pytest.raises(ValueError, match="finished"):
        stylizer.steps(pictures["content"], pictures["style"], Config(**SMALL), resume=data)


def small():
    tensors = {"image": torch.arange(6.0).view(2, 3)}
    return dump(Checkpoint({"size": 48, "layers": ["relu1_1"]}, 1, 7, tensors, {"mine": [1, "a"]}))


def test_round_trip_and_metadata_without_pickle(tmp_path):
    checkpoint = load(small())
    assert (checkpoint.scale, checkpoint.iteration) == (1, 7)
    assert torch.equal(checkpoint.tensors["image"], torch.arange(6.0).view(2, 3))
    checkpoint.check({"size": 48, "layers": ("relu1_1",)})
    (tmp_path / "run.ckpt").write_bytes(small())
    assert note(str(tmp_path / "run.ckpt")) == checkpoint.note == {"mine": [1, "a"]}
    header = json.loads(small()[8 : 8 + int.from_bytes(small()[:8], "little")])
    assert json.loads(json.loads(header["__metadata__"]["checkpoint"])["run"])["format"] == 5


@settings(max_examples=100)
@given(st.data())
def test_damage_is_a_value_error(data):
    whole = small()
    if data.draw(st.booleans()):
        broken = whole[: data.draw(st.integers(0, len(whole) - 1))]
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        broken = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    try:
        found = load(broken)
    except ValueError:
        return
    expected = load(whole)  # a changed byte that means the same, such as a space of the header
    assert dataclasses.replace(found, tensors={}) == dataclasses.replace(expected, tensors={})
    assert np.array_equal(found.tensors["image"], expected.tensors["image"])


@given(st.binary(max_size=200))
def test_anything_else_is_a_value_error(data):
    with pytest.raises(ValueError, match="damaged"):
        load(data)


def test_a_later_format_is_refused(monkeypatch):
    from engine import checkpoint

    monkeypatch.setattr(checkpoint, "_FORMAT", 6)
    later = small()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="format 6"):
        load(later)
