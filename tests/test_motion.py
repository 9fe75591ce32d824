import io
import itertools
import sys

import numpy as np
import pytest
from PIL import Image

from engine import samples
from engine.image import Picture
from engine.motion import carry
from engine.video import _CUT


def photograph():
    return np.asarray(Image.open(io.BytesIO(samples.pair()[0])).convert("RGB"), np.float32) / 255


def window(left, top, width=96, height=72):
    return Picture(photograph()[top : top + height, left : left + width].copy())


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, 1), (-2, -4)])
def test_a_picture_goes_along_with_the_motion(right, down):
    """A window that moves over a photograph, and a picture that moves with it: where it goes is known."""
    before, now = window(60, 60), window(60 + right, 60 + down)
    picture = Picture(np.random.default_rng(0).random(before.rgb.shape, np.float32))
    carried = carry(picture, before, now, 2.0)
    truth = np.full_like(picture.rgb, np.nan)
    height, width = truth.shape[:2]
    ys, xs = np.indices((height, width))
    there = (ys + down >= 0) & (ys + down < height) & (xs + right >= 0) & (xs + right < width)
    truth[there] = picture.rgb[(ys + down)[there], (xs + right)[there]]
    known = carried.certain > 0
    assert not known[~there].any(), "what was out of sight is not certain"
    assert known[there].mean() > 0.9
    # noise is what a shift of a tenth of a pixel changes most
    assert np.median(abs(carried.picture.rgb - truth)[known]) < 0.12
    assert carried.weight == 2.0
    assert carried.picture.rgb.dtype == carried.certain.dtype == np.float32


def test_what_comes_into_sight_has_the_change_of_the_content():
    """A dark square appears on a photograph: where it does, a flat picture becomes darker by as much."""
    before = window(60, 60)
    rgb = before.rgb.copy()
    rgb[20:40, 30:60] = 0
    carried = carry(Picture(np.full_like(rgb, 0.6)), before, Picture(rgb), 1.0)
    unknown = carried.certain == 0
    assert unknown[20:40, 30:60].mean() > 0.5
    inside = np.zeros_like(unknown)
    inside[20:40, 30:60] = True
    changed = abs(carried.picture.rgb - 0.6).max(-1)
    assert changed[unknown & inside].mean() > 0.1
    assert changed[~unknown].max() < 1e-6


def test_after_a_cut_next_to_nothing_is_certain():
    style = Image.open(io.BytesIO(samples.pair()[1])).convert("RGB").resize((96, 72))
    other = Picture(np.asarray(style, np.float32) / 255)
    black = Picture(np.zeros_like(other.rgb))
    for before, now in itertools.permutations((window(60, 60), other, black), 2):
        assert carry(before, before, now, 1.0).certain.mean() < _CUT / 4


def test_digest_is_that_of_all_of_it():
    before, now = window(60, 60), window(62, 60)
    first = carry(before, before, now, 1.0)
    assert first.digest == carry(before, before, now, 1.0).digest
    assert len({first.digest, carry(before, before, now, 2.0).digest, carry(now, before, now, 1.0).digest}) == 3


def test_without_opencv_the_install_line_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RuntimeError, match=r"OpenCV: pip install '.*\[video\]'"):
        carry(window(0, 0), window(0, 0), window(0, 0), 1.0)
