"""`python -m engine.export --out DIR`: write the ONNX graphs, check their numbers, print a table.

A file gets its final name only after both graphs have passed the check.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from . import graph, validate, vgg
from .commands import Parser, wrong_file
from .weights import Weights, load

_NAME = "engine.export"
DEFAULT_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu4_2", "relu5_1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 it broke, 2 the user's mistake, 130 interrupted)."""
    parser = Parser(_NAME, (__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--height", type=int, default=256, metavar="H", help="image height (default 256)")
    parser.add_argument("--width", type=int, default=256, metavar="W", help="image width (default 256)")
    parser.add_argument("--layers", default=",".join(DEFAULT_LAYERS), help="loss layers (default %(default)s)")
    for name, choices in (("pooling", vgg.POOLINGS), ("padding", vgg.PADDINGS), ("precision", vgg.PRECISIONS)):
        text = f"{', '.join(choices)} (default {choices[0]})"
        parser.add_argument(f"--{name}", default=choices[0], metavar="X", help=text)
    parser.add_argument("--weights", default="auto", help="auto, embedded, imagenet or a file (default auto)")
    options = parser.parse_args(arguments)
    try:
        layers = tuple(options.layers.split(","))
        spec = vgg.Spec(
            options.height, options.width, layers, options.pooling, options.precision, padding=options.padding
        )
        weights = load(options.weights, layers)
        rows = export(spec, weights, options.out)
    except KeyboardInterrupt:
        print(f"{_NAME}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ArithmeticError, MemoryError, RuntimeError) as error:
        print(f"{_NAME}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) or wrong_file(error) else 1
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"weights: {weights.name}", file=sys.stderr)
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def export(spec: vgg.Spec, weights: Weights, folder: Path) -> list[tuple[str, ...]]:
    """Validate the pair, then write both graphs and their weights file; returns the table, its head first.

    A graph is named after its weights file, its shape and whatever else it depends on, so that others can stand beside.

    Raises ArithmeticError if a graph is off, OSError if `folder` cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    errors = validate.check(spec, weights)
    arrays = {**graph.forward_initializers(spec, weights), **graph.vjp_initializers(spec, weights)}
    location = graph.weights_file(spec, weights)
    padding = "" if spec.padding == "zero" else f"-{spec.padding}"
    used = tuple(layer for layer in vgg.LOSS_LAYERS if layer in spec.layers)
    layers = "" if used == DEFAULT_LAYERS else f"-{hashlib.sha256(','.join(used).encode()).hexdigest()[:8]}"
    suffix = f"{Path(location).stem}{padding}{layers}-{spec.height}x{spec.width}.onnx"
    rows: list[tuple[str, ...]] = [("file", "inputs", "outputs", "opset", "size", "max error")]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as staging:
        with (Path(staging) / location).open("wb") as file:
            for name, (offset, _) in graph.offsets(spec).items():
                file.seek(offset)
                file.write(arrays[name].tobytes())
        for kind, model, error in (
            ("forward", graph.forward(spec, weights), errors.forward),
            ("vjp", graph.vjp(spec, weights), errors.vjp),
        ):
            path = Path(staging) / f"{kind}-{suffix}"
            onnx.save(model, path)
            onnx.checker.check_model(str(path), full_check=True)
            rows.append(_row(path.name, model, path.stat().st_size, f"{error:.1e}"))
        size = (Path(staging) / location).stat().st_size
        rows.append((location, "", "", "", _megabytes(size), ""))
        for path in Path(staging).iterdir():
            path.replace(folder / path.name)
    return rows


def _row(name: str, model: onnx.ModelProto, size: int, error: str) -> tuple[str, ...]:
    def count(infos: Sequence[onnx.ValueInfoProto]) -> str:
        return infos[0].name if len(infos) == 1 else f"{len(infos)} ({infos[0].name} ... {infos[-1].name})"

    opset = str(model.opset_import[0].version)
    return name, count(model.graph.input), count(model.graph.output), opset, _megabytes(size), error


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    sys.exit(main())
