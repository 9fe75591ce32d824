"""Each preset against the formula of the program that it is named after, written down from that program: float64."""

import numpy as np
import oracle
import pytest
import torch
from torch.nn import functional

from engine import Stylizer, preset, stylize
from engine.presets import PRESETS

BLOCKS = ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]


def pystiche(x, content, style, see):
    """Content MSE; Gram matrices divided by the number of positions, their MSE averaged over the layers, times 1e3."""
    f, p, a = (see(picture, "max", {"relu4_2", *BLOCKS}) for picture in (x, content, style))
    loss = functional.mse_loss(f["relu4_2"], p["relu4_2"])
    for layer in BLOCKS:
        own, wanted = (torch.einsum("im,jm->ij", each[layer], each[layer]) / each[layer].shape[1] for each in (f, a))
        loss = loss + 1e3 / 5 * functional.mse_loss(own, wanted)
    return loss


FORMULAS = {"pystiche": (pystiche, "torchvision")}


def test_every_preset_has_its_formula():
    assert set(FORMULAS) == set(PRESETS)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_loss_and_gradient_are_the_programs(states, name):
    """With max pooling rounding may route a gradient to the other of two nearly equal values, which one picture in
    some shows; so the gradient has to agree for one of them.
    """
    formula, naming = FORMULAS[name]
    path, state = states[naming]
    own, errors = Stylizer(weights=path, device="cpu"), []
    for seed in range(4):
        pictures = [np.random.default_rng(3 * seed + i).random((48, 64, 3)).astype(np.float32) for i in range(3)]
        x, content, style = (torch.from_numpy(picture.astype(np.float64)) for picture in pictures)
        x.requires_grad_()
        loss = formula(x, content, style, lambda picture, *rest: oracle.features(picture, state, *rest))
        (gradient,) = torch.autograd.grad(loss, x)
        score = own.evaluate(*pictures, preset(name))
        assert score.loss == pytest.approx(loss.item(), rel=1e-5)
        errors.append(np.linalg.norm(score.gradient - gradient.numpy()) / np.linalg.norm(gradient.numpy()))
        if errors[-1] < 1e-4:
            return
    raise AssertionError(errors)


def parsed(*arguments):
    return stylize._config(stylize._parser().parse_args(arguments))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_of_the_command_line_and_options_that_win(name):
    config = parsed("--preset", name)
    assert config == preset(name)
    assert config != parsed()
    assert parsed("--preset", name, "--style-weight", "7") == preset(name, style_weight=7.0)
    assert preset(name, seed=3).seed == 3


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="did you mean pystiche"):
        preset("pystich")
    with pytest.raises(ValueError, match="did you mean pystiche"):
        parsed("--preset", "pystich")
