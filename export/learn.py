"""Learns the features that ship with the package: `python -m engine.export.learn --out FILE.safetensors [--seed N]`.

One convolution after another, without labels or gradients, from the pictures of `drawings`. For the activations x
(N, C, H, W) that reach a convolution:

1. What all channels have in common on average is taken out of each position. So the nine taps of a filter each give
   nothing for the mean activation, and a neighbour outside the picture, for which the convolution takes zero, counts as
   an average one: the rim of a picture is painted like the rest of it.
2. The channels are rotated to their principal axes, the weakest are dropped and the others brought nearer to each
   other in deviation. Then the same for 3x3 patches of them: what is left of a patch is a vector of some hundreds of
   numbers; with fewer the deep layers forget where things are, and faces dissolve. Whitening in full would teach the
   filters noise, and the style loss would paint it; none at all would leave them blind to everything but light and
   dark. The powers in `Recipe` stand between.
3. Spherical k-means (Coates, Ng 2012) with one centroid an output channel, on vectors of comparable length. Steps 1
   and 2 are linear, so a filter is its centroid taken back through them.
4. The filter is rounded to the bits it is stored with; the bias makes the ReLU pass the same share of positions in each
   channel; the length makes what passes have root mean square `RMS`. The next layer learns from the rounded one.

Behind the first convolution that share is larger: filters without a mean see nothing in a flat area of a middling
colour, and where next to nothing passes, the style has no gradient and the area stays as it is.

With every channel of a layer at one scale, all of them have a say in its Gram matrix. Layers past `deepest` are random
directions (see `embedded`), calibrated in the same way.

Torch runs on one thread: the same seed and the same versions give the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from . import embedded, vgg
from .drawings import PHOTOGRAPHS, pictures
from .weights import IMAGENET_MEAN, IMAGENET_STD

# Root mean square of every channel behind its ReLU, by block. The balance of style and content losses depends on it.
# The first blocks are louder: they know the palette, which would give way to strokes, and grey would stay grey.
RMS = (0.7, 0.5, 0.4, 0.35, 0.35)
_CHUNK = 4  # pictures a convolution works on at a time


@dataclass(frozen=True)
class Recipe:
    """All that decides the result besides versions; per-block numbers are in the order of the blocks."""

    seed: int = 0
    photographs: tuple[str, ...] = PHOTOGRAPHS
    deepest: str = "conv5_1"  # the last layer that is learned
    pictures: int = 48
    side: int = 192
    patches: int = 40_000
    channel_axes: int = 256
    patch_axes: tuple[int, ...] = (27, 192, 384, 512, 512)
    channel_power: float = 0.6  # 0 leaves the deviations of the axes as they are, 1 makes them equal
    patch_power: float = 0.7
    channel_floor: float = 0.01  # noise floor of the variances, in means of the variances
    patch_floor: float = 0.03
    kept_variance: float = 0.995
    length_floor: float = 0.3  # softens the normalisation of the vectors, in mean lengths: flat patches stay short
    rounds: int = 15
    active: float = 0.45  # share of positions that pass the ReLU
    first_active: float = 0.75  # behind the first convolution: so that nearly every colour passes, a flat area's too
    bits: tuple[int, ...] = (8, 8, 8, 4, 4)


def learn(recipe: Recipe, progress: bool = True) -> dict[str, Tensor]:
    """The tensors of the file that `embedded` describes."""
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(recipe.seed)
    steps = tqdm(total=recipe.pictures + len(vgg.CONVS), file=sys.stderr, disable=not progress, desc="pictures")
    images = []
    for picture in pictures(recipe.pictures, recipe.side, recipe.seed, recipe.photographs):
        images.append(torch.from_numpy(picture))
        steps.update()
    mean, std = torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1), torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    x = (torch.stack(images) - mean) / std
    tensors: dict[str, Tensor] = {}
    learned = True
    for conv in vgg.CONVS:
        steps.set_description(conv.name)
        if conv.after_pool:
            x = functional.avg_pool2d(x, 2)
        patches = _patches(x, recipe.patches, generator)
        if learned:
            weight = _filters(patches, conv.out_channels, conv.block - 1, recipe, generator)
            stored, step = embedded.shrink(weight, recipe.bits[conv.block - 1])
            tensors[f"{conv.name}.weight"] = stored
        else:
            stored, step = embedded.directions(conv, recipe.seed), torch.ones(conv.out_channels)
        weight = embedded.expand(stored, step, conv)
        active = recipe.first_active if conv is vgg.CONVS[0] else recipe.active
        length, bias = _calibration(patches.flatten(1) @ weight.flatten(1).T, active, RMS[conv.block - 1])
        tensors[f"{conv.name}.step"], tensors[f"{conv.name}.bias"] = step * length, bias
        weight = embedded.expand(stored, step * length, conv)
        x = torch.cat([functional.relu(functional.conv2d(part, weight, bias, padding=1)) for part in x.split(_CHUNK)])
        learned = learned and conv.name != recipe.deepest
        steps.update()
    steps.close()
    return tensors


def _patches(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` 3x3 patches (n, C, 9) at random positions.

    The rim is left out: what the padding does to it is no structure of pictures.
    """
    pictures, channels, height, width = x.shape
    height, width = height - 2, width - 2
    chosen = torch.randperm(pictures * height * width, generator=generator)[:count]
    column, row, picture = chosen % width, chosen // width % height, chosen // (height * width)
    patches = torch.empty(len(chosen), channels, 9)
    for tap in range(9):
        patches[:, :, tap] = x[picture, :, row + tap // 3, column + tap % 3]
    return patches


def _filters(patches: Tensor, count: int, block: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Filters (count, C, 3, 3) learned from patches (n, C, 9): steps 1 to 3."""
    channels = patches.shape[1]
    mean = patches.mean((0, 2))
    rows = (patches - mean[:, None]).transpose(1, 2)  # (n, 9, C)
    if channels > 3:  # normalised pixels have a mean of about zero already
        rows -= (rows @ mean)[..., None] * (mean / (mean @ mean))
    axes = _axes(rows.reshape(-1, channels), recipe.channel_power, recipe.channel_floor)[:, : recipe.channel_axes]
    vectors = (rows @ axes).flatten(1)  # (n, 9 q)
    vectors -= vectors.mean(0)
    whitening = _axes(vectors, recipe.patch_power, recipe.patch_floor, recipe.kept_variance)
    whitening = whitening[:, : recipe.patch_axes[block]]  # (9 q, p)
    vectors = vectors @ whitening
    length = vectors.norm(dim=1, keepdim=True)
    centroids = _spherical_kmeans(vectors / (length + recipe.length_floor * length.mean()), count, recipe, generator)
    taps = (centroids @ whitening.T).reshape(count, 9, -1) @ axes.T  # (count, 9, C)
    return taps.transpose(1, 2).reshape(count, channels, 3, 3).contiguous()


def _axes(rows: Tensor, power: float, floor: float, kept: float = 1.0) -> Tensor:
    """Principal axes (d, p) of centred rows (n, d), strongest first, that hold the share `kept` of the variance.

    Projecting on them divides each deviation by its `power`: whitens for 1, only rotates for 0.
    """
    variance, axes = torch.linalg.eigh((rows.T @ rows / len(rows)).double())
    variance, axes = variance.flip(0).clamp(min=0), axes.flip(1)
    count = int((variance.cumsum(0) < kept * variance.sum()).sum()) + 1
    scale = (variance / variance[0] + floor * variance.mean() / variance[0]) ** (power / 2)
    return (axes / scale)[:, :count].float()


def _spherical_kmeans(vectors: Tensor, count: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Unit centroids (count, p) of vectors (n, p); one that attracts nothing starts again at a random vector."""
    order = torch.randperm(len(vectors), generator=generator)
    centroids = functional.normalize(vectors[order[:count]], dim=1)
    for _ in range(recipe.rounds):
        similarity, nearest = (vectors @ centroids.T).max(1)
        hits = torch.bincount(nearest, minlength=count)
        centroids = centroids.index_add(0, nearest, vectors * similarity[:, None])
        idle = (hits < 2).nonzero().flatten()
        fresh = torch.randperm(len(vectors), generator=generator)[: len(idle)]
        centroids[idle] = vectors[fresh]
        centroids = functional.normalize(centroids, dim=1)
    return centroids


def _calibration(responses: Tensor, active: float, size: float) -> tuple[Tensor, Tensor]:
    """Lengths and biases (C,) by which filters of these responses (n, C) pass a share `active` at rms `size`."""
    threshold = responses.sort(0).values[int((1 - active) * (len(responses) - 1))]
    passed = functional.relu(responses - threshold).square().mean(0).sqrt()
    length = size / passed.clamp(min=1e-6 * float(passed.max()))
    return length, -threshold * length


def recipe_text(recipe: Recipe) -> str:
    """How the file came about, as JSON: all that is needed to make it again."""
    versions = {name: version(name) for name in ("numpy", "pillow", "scikit-image", "torch")}
    versions["python"] = platform.python_version()
    method = "engine.export.learn: spherical k-means of partly whitened patches, layer by layer"
    data = "engine.export.drawings; photographs (CC0, public domain) from scikit-image"
    settings = asdict(recipe) | {"rms": RMS}
    return json.dumps({"method": method, "data": data, "versions": versions, **settings}, sort_keys=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m engine.export.learn", description="Learn the embedded features.")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the .safetensors file to write")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of pictures and learning (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    from safetensors.torch import save

    recipe = Recipe(seed=options.seed)
    torch.set_num_threads(1)  # the order of sums, and with it the last bit, depends on the number of threads
    torch.use_deterministic_algorithms(True)
    with torch.inference_mode():
        tensors = learn(recipe, progress=not options.quiet)
    # One entry only: safetensors writes several in an order of its own, another one each time.
    content = save({key: tensors[key].contiguous() for key in sorted(tensors)}, {"recipe": recipe_text(recipe)})
    partial = options.out.with_suffix(".partial")
    try:
        partial.write_bytes(content)
        partial.replace(options.out)
    finally:
        partial.unlink(missing_ok=True)
    digest = hashlib.sha256(content).hexdigest()
    sys.stderr.write(f"{options.out}: {len(content) / 2**20:.2f} MiB, sha256 {digest}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
