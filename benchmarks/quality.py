"""How good the pictures are: `python -m benchmarks.quality`. Writes a contact sheet, a table and the table's numbers.

The sheet: each content under each style with the default options, and below each style a texture made from noise by its
style loss alone. Contents are photographs of scikit-image that the features were not learned from: `astronaut` (NASA,
public domain), `camera` (Lav Varshney, CC0), `chelsea` (Stefan van der Walt, CC0); the styles are drawn by `styles`.

The table: results of three sets of weights, judged by networks that were not optimised:

    learned  features of the same method, but that the first convolution is like the others, from another seed and other
             photographs; content at relu4_2
    gabor    moduli of complex Gabor filters of eight orientations on five octaves, none of it learned; content at the
             third octave

    random   VGG-19 after He's initialisation (He et al. 2015)
    k-means  spherical k-means of fully whitened patches up to conv4_1, random above
    final    the embedded features

A result can always have less style distance for more content distance, so each pair of pictures is painted with style
weights up to the default one, and style distances are compared at one content distance: as far from the content as all
sets of weights come, and half way, where the style is faint and no set can be far ahead, as all start at the content
picture itself. In between the logarithm of the style distance is interpolated. Style distance
is |G - A|^2 / |A|^2 for the Gram matrices G of the result and A of the style, content distance the mean square of F - P
in variances of P; style distances are averaged over layers, and over pairs as a geometric mean of ratios to `random`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from engine import Config, Stylizer
from engine import image as images
from engine.export import embedded, vgg
from engine.export.learn import Recipe, learn
from engine.export.weights import load as load_weights

from .machine import ROOT, commit
from .machine import parser as parser_of
from .styles import STYLES

CONTENTS = ("astronaut", "camera", "chelsea")
PAIRS = (("astronaut", "mosaic"), ("camera", "engraving"), ("chelsea", "oil"))
STYLE_WEIGHTS = (1e2, 3e2, 1e3, 3e3, 1e4)
SHARES = (0.5, 1.0)  # of the content distance that all sets of weights reach
# One share of positions passes behind every convolution: of the judge, so that it does not change with what it judges.
SMALL = Recipe(pictures=32, side=160, patches=20_000, first_active=Recipe.active)
JUDGE = replace(SMALL, seed=77, photographs=("coins", "gravel", "hubble_deep_field", "retina"))
FLOOR = replace(SMALL, channel_power=1, patch_power=1, channel_floor=1e-3, patch_floor=1e-2, deepest="conv4_1")
CELL = 160  # pixels of a picture in the sheet
Features = dict[str, Tensor]  # (C, positions) by layer
Judge = tuple[Callable[[Image.Image], Features], str]  # features of a picture; layer of the content distance


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("quality", __doc__)
    parser.add_argument("what", nargs="?", choices=("sheet", "table"), help="only one of the two")
    parser.add_argument("--size", type=int, default=160, help="long side of the results in pixels (default 160)")
    parser.add_argument("--iterations", type=int, default=100, help="of the table's last scale (default 100)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder (default results/)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what != "table":
        sheet(args.size).save(args.out / "sheet.jpg", quality=85)
    if args.what != "sheet":
        report = table(args.size, args.iterations)
        (args.out / "quality.json").write_text(json.dumps(report, indent=1) + "\n")
        _print(report)
    return 0


def sheet(size: int) -> Image.Image:
    """Styles in the first row, contents in the first column, textures in the last row."""
    stylizer, config = Stylizer("embedded"), Config(size=size)
    styles = {name: draw() for name, draw in STYLES.items()}
    rows: list[list[Image.Image | None]] = [[None, *styles.values()]]
    texture = replace(config, content_weight=0, init="noise")
    bar = tqdm(total=(len(CONTENTS) + 1) * len(styles), desc="sheet", file=sys.stderr)
    for name in (*CONTENTS, None):
        content = photograph(name) if name else None
        rows.append([content])
        for style in styles.values():
            source, options = (content, config) if content else (style, texture)
            rows[-1].append(stylizer(source, style, options).image)
            bar.update()
    bar.close()
    page = Image.new("RGB", (CELL * len(rows[0]), CELL * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            if picture:
                scale = (CELL - 4) / max(picture.size)
                small = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)
                page.paste(small, (x * CELL + (CELL - small.width) // 2, y * CELL + (CELL - small.height) // 2))
    return page


def table(size: int, iterations: int) -> dict[str, object]:
    """Style distance of each set of weights as a multiple of that of `random`, by judge, at equal content distance."""
    with tempfile.TemporaryDirectory() as folder:
        sources = {"random": Path(folder, "random.safetensors"), "k-means": Path(folder, "k-means.safetensors")}
        save_file(he(), sources["random"])
        save_file(_parameters(FLOOR), sources["k-means"])
        save_file(other(), Path(folder, "judge.safetensors"))
        judges = {"learned": network(Path(folder, "judge.safetensors")), "gabor": (gabor, "modulus 2")}
        config = Config(size=size, iterations=iterations).for_weights("embedded")  # the others have its layers, too
        styles = {name: STYLES[name]() for _, name in PAIRS}
        found: dict[str, dict[str, dict[str, list[tuple[float, float]]]]] = {}
        bar = tqdm(total=3 * len(PAIRS) * len(STYLE_WEIGHTS), desc="table", file=sys.stderr)
        for weights in ("random", "k-means", "final"):
            stylizer = Stylizer(sources.get(weights, "embedded"))
            for content_name, style_name in PAIRS:
                content, style = photograph(content_name), styles[style_name]
                results = [content]
                for weight in STYLE_WEIGHTS:
                    results.append(stylizer(content, style, replace(config, style_weight=weight)).image)
                    bar.update()
                pair = found.setdefault(f"{content_name} x {style_name}", {})
                for name, judge in judges.items():
                    pair.setdefault(name, {})[weights] = [distances(judge, x, content, style, size) for x in results]
        bar.close()
    report = {
        "commit": commit(),
        "size": size,
        "iterations": iterations,
        "precision": stylizer.precision,
        "curves": found,
    }
    return report | {"ratios": {str(share): ratios(found, share) for share in SHARES}}


def photograph(name: str) -> Image.Image:
    """A photograph of scikit-image."""
    return Image.fromarray(getattr(data, name)()).convert("RGB")


def he() -> dict[str, Tensor]:
    """VGG-19 at random (He et al. 2015): Gaussian filters of variance 2 / (9 C_in), no bias."""
    generator = torch.Generator().manual_seed(0)
    parameters = {}
    for conv in vgg.CONVS:
        filters = torch.randn(conv.out_channels, conv.in_channels, 3, 3, generator=generator)
        parameters[f"{conv.name}.weight"] = filters * math.sqrt(2 / (9 * conv.in_channels))
        parameters[f"{conv.name}.bias"] = torch.zeros(conv.out_channels)
    return _torchvision_names(parameters)


def other() -> dict[str, Tensor]:
    """Features of the same method, but for its first convolution, from another seed and other photographs."""
    return _parameters(JUDGE)


def _parameters(recipe: Recipe) -> dict[str, Tensor]:
    with torch.inference_mode():
        tensors = learn(recipe)
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        save_file(tensors, file.name, {"recipe": json.dumps({"seed": recipe.seed})})
        return _torchvision_names(embedded.load_embedded(vgg.CONVS, Path(file.name)))


def _torchvision_names(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names by which a weights file is known to take RGB, normalised by ImageNet's mean and deviation."""
    from torchvision.models.vgg import vgg19

    names = [name for name in vgg19().state_dict() if name.startswith("features")]
    return dict(zip(names, (value.contiguous().clone() for value in parameters.values()), strict=True))


def network(source: Path) -> Judge:
    """A judge: the VGG-19 of a file at the paper's layers."""
    layers = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1", "relu4_2")
    module = load_weights(source, layers).module(layers, "avg")

    def features(picture: Image.Image) -> Features:
        with torch.no_grad():
            found = module(images.to_tensor(images.load(picture)))
        return {layer: value[0].flatten(1) for layer, value in found.items()}

    return features, "relu4_2"


def gabor(picture: Image.Image) -> Features:
    """A judge without learning: each octave's colours and moduli of Gabor filters (27, positions)."""
    x = images.to_tensor(images.load(picture))[0][:, None]  # (3, 1, H, W)
    axis = torch.arange(-4.0, 5.0)
    angle = torch.arange(8)[:, None, None] * math.pi / 8
    along = axis * angle.cos() + axis[:, None] * angle.sin()  # (8, 9, 9)
    window = torch.exp(-(axis**2 + axis[:, None] ** 2) / (2 * 1.8**2))
    waves = [wave * window for wave in (torch.cos(along * math.pi / 2), torch.sin(along * math.pi / 2))]
    even, odd = ((wave - window * wave.sum((1, 2), keepdim=True) / window.sum())[:, None] for wave in waves)
    found = {}
    for octave in range(5):
        framed = functional.pad(x, (4, 4, 4, 4), "reflect")
        modulus = torch.hypot(functional.conv2d(framed, even), functional.conv2d(framed, odd))  # (3, 8, H, W)
        found[f"modulus {octave}"] = torch.cat([modulus.flatten(0, 1), x[:, 0] - 0.5]).flatten(1)
        x = functional.avg_pool2d(x, 2)
    return found


def distances(
    judge: Judge, result: Image.Image, content: Image.Image, style: Image.Image, size: int
) -> tuple[float, float]:
    """(content distance, style distance) of a result, all pictures brought to the long side `size`."""
    describe, content_layer = judge
    z, p, a = (describe(_fit(picture, size)) for picture in (result, content, style))
    content_distance = (z[content_layer] - p[content_layer]).square().mean() / p[content_layer].var()
    layers = [layer for layer in z if layer != "relu4_2"]
    style_distance = [
        (_gram(z[layer]) - _gram(a[layer])).square().sum() / _gram(a[layer]).square().sum() for layer in layers
    ]
    return float(content_distance), float(torch.stack(style_distance).mean())


def _fit(picture: Image.Image, size: int) -> Image.Image:
    scale = size / max(picture.size)
    return picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)


def _gram(features: Tensor) -> Tensor:
    return features @ features.T / features.shape[1]


def at_equal_content(curves: Mapping[str, Sequence[tuple[float, float]]], share: float) -> dict[str, float]:
    """Style distances of curves of (content distance, style distance > 0) at one content distance.

    It lies at a `share` of the way through the content distances that all curves span; between points the logarithm is
    linear. Raises ValueError if no content distance is common to all.
    """
    low = max(min(content for content, _ in curve) for curve in curves.values())
    high = min(max(content for content, _ in curve) for curve in curves.values())
    if low > high:
        raise ValueError(f"the curves have no content distance in common: one starts at {low}, one ends at {high}")
    found = {}
    for name, curve in curves.items():
        content, style = np.array(sorted(curve)).T
        found[name] = float(np.exp(np.interp(low + share * (high - low), content, np.log(style))))
    return found


def ratios(
    found: Mapping[str, Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]], share: float
) -> dict[str, dict[str, float]]:
    """{judge: {weights: style distance over that of `random`}}, the geometric mean over {pair: {judge: curves}}."""
    logs: dict[str, dict[str, list[float]]] = {}
    for judges in found.values():
        for judge, curves in judges.items():
            style = at_equal_content(curves, share)
            for weights, value in style.items():
                logs.setdefault(judge, {}).setdefault(weights, []).append(math.log(value / style["random"]))
    return {judge: {weights: math.exp(np.mean(v)) for weights, v in rows.items()} for judge, rows in logs.items()}


def _print(report: Mapping[str, object]) -> None:
    shares = report["ratios"]
    assert isinstance(shares, dict)
    print("style distance over that of random weights, at a share of the content distance that all reach")
    for share, rows in shares.items():
        print(f"{share:<12}" + "".join(f"{weights:>10}" for weights in next(iter(rows.values()))))
        for judge, row in rows.items():
            print(f"{judge:<12}" + "".join(f"{value:10.2f}" for value in row.values()))


if __name__ == "__main__":
    sys.exit(main())
