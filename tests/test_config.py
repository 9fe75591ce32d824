import contextlib
import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine import Config
from engine.image import Picture


@pytest.mark.parametrize(("kind", "layer"), [("embedded", "relu2_2"), ("imagenet", "relu4_2"), ("caffe", "relu4_2")])
def test_defaults_are_the_papers_layers_but_for_the_content_of_the_embedded_weights(kind, layer):
    config = Config()
    blocks = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    assert tuple(config.style_layer_weights) == blocks
    with pytest.raises(ValueError, match="for_weights"):
        _ = config.layers
    chosen = config.for_weights(kind)
    assert chosen == dataclasses.replace(config, content_layers=(layer,))
    assert chosen.content_layer_weights == {layer: 1}
    assert chosen.layers == tuple(sorted((*blocks, layer)))
    named = Config(content_layers=("relu3_1:2",))
    assert named.for_weights(kind) == named


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"size": 31}, ValueError, "from 32"),
        ({"size": (64, 64, 3)}, ValueError, "width and height"),
        ({"size": (64, 31)}, ValueError, "from 32"),
        ({"style_scale": 2, "style_size": 64}, ValueError, "exclude each other"),
        ({"style_scale": 0.001}, ValueError, "from 1/64 to 64"),
        ({"style_scale": 65}, ValueError, "from 1/64 to 64"),
        ({"style_scale": (1, 65)}, ValueError, "style_scale 65: give a number from 1/64 to 64"),
        ({"style_scale": ()}, ValueError, "give a number, or one for each style"),
        ({"style_scale": (1, "2")}, TypeError, "style_scale has to be a number"),
        ({"style_scale": (1, 2), "style_size": 64}, ValueError, "exclude each other"),
        ({"style_blend": 3}, TypeError, "tuple of numbers"),
        ({"size": "orignal"}, ValueError, "original or a number"),
        ({"size": 2.5}, TypeError, "whole number"),
        ({"size": True}, TypeError, "whole number"),
        ({"iterations": 0}, ValueError, "from 1"),
        ({"iterations": ()}, ValueError, "at least one"),
        ({"iterations": (3, -1)}, ValueError, "from 1"),
        ({"iterations": ("...",)}, ValueError, "at least one"),
        ({"iterations": ("...", 3)}, TypeError, "whole number"),
        ({"scales": "many"}, ValueError, "auto or a number"),
        ({"scales": 0}, ValueError, "from 1"),
        ({"init": 3}, TypeError, "init has to be a word or the path of a picture, not int"),
        ({"style_weight": -1}, ValueError, "not negative"),
        ({"content_weight": math.nan}, ValueError, "finite"),
        ({"content_weight": 10**400}, ValueError, "content_weight: the number is beyond all"),
        ({"style_layers": (("relu1_1", 10**400),)}, ValueError, "beyond all"),
        ({"style_scale": 10**400}, ValueError, "beyond all"),
        ({"style_blend": (1, 10**400)}, ValueError, "beyond all"),
        ({"tv_weight": "1"}, TypeError, "number"),
        ({"style_layers": ("relu4_5",)}, ValueError, "did you mean relu4_"),
        ({"style_layers": "relu1_1"}, TypeError, "tuple of layers"),
        ({"content_layers": ()}, ValueError, "at least one layer"),
        ({"content_layers": "relu4_2"}, TypeError, "auto or a tuple of layers"),
        ({"content_layers": np.array(["relu4_2"])}, TypeError, "auto or a tuple of layers"),
        ({"style_layers": "auto"}, TypeError, "has to be a tuple of layers"),
        ({"content_layers": ("relu1_1", "relu1_1:2")}, ValueError, "twice"),
        ({"style_layers": ("relu1_1:much",)}, ValueError, "NAME:WEIGHT"),
        ({"style_layers": (("relu1_1", -1),)}, ValueError, "not negative"),
        ({"style_layers": (("relu1_1", "1"),)}, TypeError, "number"),
        ({"style_layers": ("relu1_1:0",)}, ValueError, "not zero"),
        ({"pooling": "maxx"}, ValueError, "did you mean max"),
        ({"optimizer": "lbgfs"}, ValueError, "did you mean lbfgs"),
        ({"seed": -1}, ValueError, "from 0"),
        ({"tv_power": 0.5}, ValueError, "from 1 to 16"),
        ({"average": 1.0}, ValueError, "from 0 to 0.9999"),
        ({"stop": math.nan}, ValueError, "from 0 to 1"),
        ({"stop": "0.1"}, TypeError, "number"),
        ({"iterations": "..."}, TypeError, "whole number"),
        ({"learning_rate": 0}, ValueError, "from 1e-06"),
        ({"history": 101}, ValueError, "from 1 to 100"),
        ({"history": "all"}, ValueError, "auto or a number"),
        ({"clamp": 1}, TypeError, "True or False"),
        ({"tile": "yes"}, TypeError, "True or False"),
        ({"tv_form": "nine-points"}, ValueError, "did you mean nine-point"),
        ({"content_loss": "summ"}, ValueError, "did you mean sum"),
        ({"pixel_range": "0-1"}, ValueError, "choose from auto, 0-255, 0-256"),
        ({"padding": "replicat"}, ValueError, "did you mean replicate"),
    ],
)
def test_mistakes_are_named(options, error, words):
    with pytest.raises(error, match=words):
        Config(**options)


def test_whole_numbers_are_taken_for_real_ones():
    numbers = [option.name for option in dataclasses.fields(Config) if isinstance(option.default, float)]
    assert {"learning_rate", "content_weight", "tv_power"} <= set(numbers)
    config = Config(
        **{name: np.float64(1) if name == "tv_weight" else 1 for name in numbers if name != "average"}, average=0
    )
    assert {type(getattr(config, name)) for name in numbers} == {float}


def test_layers_in_every_form_have_one_normal_form():
    config = Config(style_layers=["relu1_1", "relu4_1:0.5", ("relu5_4", 2)], content_layers=[["relu3_1", 3]])
    assert config.style_layers == (("relu1_1", 1.0), ("relu4_1", 0.5), ("relu5_4", 2.0))
    assert config.style_layer_weights == {"relu1_1": 1 / 3.5, "relu4_1": 0.5 / 3.5, "relu5_4": 2 / 3.5}
    assert config.content_layer_weights == {"relu3_1": 3.0}
    assert dataclasses.replace(config, size=64).style_layers == config.style_layers


@pytest.mark.parametrize(
    "options", [{"style_blend": (1e308, 1e308)}, {"style_layers": ("relu1_1:1e308", "relu2_1:1e308")}]
)
def test_weights_whose_sum_is_no_number_are_refused(options):
    """Or all of them would be zero, divided by it."""
    with pytest.raises(ValueError, match="sum of the weights is beyond all numbers"):
        Config(**options)


def test_schedule_grows_by_sqrt_2_and_works_most_at_the_last_scale():
    schedule = Config(size=512, iterations=100).schedule(1.5)
    assert [side for side, _ in schedule] == [128, 181, 256, 362, 512]
    assert [count for _, count in schedule] == [40, 40, 40, 40, 100]


def test_schedule_takes_numbers_for_each_scale():
    assert Config(size=256, iterations=(5, 4, 3)).schedule(1) == [(128, 5), (181, 4), (256, 3)]
    assert Config(size=256, iterations=(5, 4, "...")).schedule(1) == [(128, 5), (181, 4), (256, 4)]
    assert Config(size=128, iterations=[5, 4, "..."]).schedule(1) == [(128, 5)]
    assert Config(size=256, scales=1, iterations=7).schedule(1) == [(256, 7)]
    assert Config(size=200, scales=2, iterations=(7,)).schedule(1) == [(141, 7), (200, 7)]
    with pytest.raises(ValueError, match="names 2 scales, there are 3"):
        Config(size=256, iterations=(5, 4)).schedule(1)


def test_scales_that_tiling_makes_equal_are_one():
    assert [side for side, _ in Config(size=46, tile=True, scales=2).schedule(1.0)] == [48]
    assert len(Config(size=46, scales=2).schedule(1.0)) == 2


def test_original_is_the_size_of_the_content():
    config = Config(size="original", scales=1, iterations=4)
    assert config.sized(300).schedule(1.5) == [(300, 4)]
    assert Config(size=64).sized(300).size == 64
    with pytest.raises(ValueError, match="from 32"):
        config.sized(20)


@given(size=st.integers(32, 4096), aspect=st.floats(1, 40))
def test_every_scale_is_large_enough(size, aspect):
    config = Config(size=size)
    if round(size / aspect) < 32:
        with pytest.raises(ValueError, match="choose a larger size"):
            config.schedule(aspect)
        return
    schedule = config.schedule(aspect)
    sides = [side for side, _ in schedule]
    assert sides[-1] == size
    assert sides == sorted(sides)
    assert all(round(side / aspect) >= 32 for side in sides)
    assert all(count >= 1 for _, count in schedule)


@given(shape=st.tuples(st.integers(32, 4000), st.integers(32, 4000)), size=st.integers(32, 1024))
@example((2000, 360), 700)
@example((90, 500), 700)
@example((100, 90), 35)
def test_pictures_at_every_scale_are_as_large_as_the_schedule_has_it(shape, size):
    picture = Picture(np.broadcast_to(np.float32(0), (*shape, 3)))
    assert picture.fit(max(shape)) == shape[::-1]
    with contextlib.suppress(ValueError):
        for side, _ in Config(size=size).schedule(picture.aspect):
            assert max(picture.fit(side)) == side
            assert min(picture.fit(side)) >= 32


@given(size=st.integers(32, 2048), aspect=st.floats(1, 8))
def test_sides_of_a_picture_that_tiles_are_multiples_of_16(size, aspect):
    if round(size / aspect) < 32:
        return
    config = Config(size=size, tile=True)
    for side, _ in config.schedule(aspect):
        width, height = config.whole((side, round(side / aspect)))
        assert width == side
        assert width % 16 == height % 16 == 0
    assert size <= side < size + 16
    assert Config().whole((33, 47)) == (33, 47)


def test_numbers_of_numpy_are_numbers():
    """As shapes and sums of arrays are; a manifest is written with `json`, which knows Python's only."""
    given = {"size": np.array([64, 48]).max(), "iterations": [np.int32(3), "..."], "scales": np.uint8(2)}
    given |= {"style_weight": np.float32(0.5), "style_layers": [["relu1_1", np.float64(2)]], "init_noise": np.int8(1)}
    config = Config(**given)
    expected = Config(
        size=64, iterations=(3, "..."), scales=2, style_weight=0.5, style_layers=(("relu1_1", 2.0),), init_noise=1.0
    )
    assert config == expected
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(expected))
    with pytest.raises(TypeError, match="clamp has to be True or False"):
        Config(clamp=np.int64(1))
    with pytest.raises(ValueError, match="style_weight nan: give a finite number"):
        Config(style_weight=np.float32("nan"))
