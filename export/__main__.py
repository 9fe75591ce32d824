"""`python -m engine.export --out DIR`: write the ONNX graphs, check their numbers, print a table.

A file gets its final name only after both graphs have passed the check.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from . import graph, validate, vgg
from .files import wrong_file
from .ort import BackendError
from .weights import Weights, load

DEFAULT_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu4_2", "relu5_1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 it broke, 2 the user's mistake)."""
    parser = argparse.ArgumentParser(prog="python -m engine.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--height", type=int, default=256, metavar="H", help="image height (default 256)")
    parser.add_argument("--width", type=int, default=256, metavar="W", help="image width (default 256)")
    parser.add_argument("--layers", default=",".join(DEFAULT_LAYERS), help="loss layers (default %(default)s)")
    parser.add_argument("--pooling", choices=("avg", "max"), default="avg", help="pooling (default avg)")
    parser.add_argument("--padding", choices=vgg.PADDINGS, default="zero", help="beyond the border (default zero)")
    parser.add_argument("--precision", choices=vgg.PRECISIONS, default="fp32", help="precision (default fp32)")
    parser.add_argument("--weights", default="auto", help="auto, embedded, imagenet or a file (default auto)")
    options = parser.parse_args(arguments)
    try:
        layers = tuple(options.layers.split(","))
        spec = vgg.Spec(
            options.height, options.width, layers, options.pooling, options.precision, padding=options.padding
        )
        weights = load(options.weights, layers)
        rows = export(spec, weights, options.out)
    except (ValueError, OSError, ArithmeticError, MemoryError, BackendError) as error:
        print(f"engine.export: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) or wrong_file(error) else 1
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
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
