"""`python -m engine.stylize CONTENT STYLE [STYLE ...] -o OUT`: the command line.

Everything heavy is imported after the options have been read, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .config import Config, choice, options

if TYPE_CHECKING:
    from .stylizer import Step

_NAME = "engine.stylize"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{_NAME}: {message} (--help lists the options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=f"python -m {_NAME}",
        description="Paint the content picture in the style of the others (Gatys, Ecker, Bethge 2015).",
        allow_abbrev=False,
    )
    parser.add_argument("content", nargs="?", metavar="CONTENT", help="picture to paint; - reads a pipe")
    parser.add_argument(
        "styles", nargs="*", metavar="STYLE", help="picture whose style is taken; several share equally"
    )
    parser.add_argument(
        "-o", "--out", metavar="OUT", help="picture to write: png, jpg, webp, tif, bmp; - writes a PNG pipe"
    )
    parser.add_argument("--demo", action="store_true", help="use the bundled sample pair")
    group = parser.add_argument_group("what is optimised")
    for option in options():
        default = ",".join(option.default) if isinstance(option.default, tuple) else option.default
        text = f"{option.metadata['help']} (default {default})"
        flag = "--" + option.name.replace("_", "-")
        group.add_argument(flag, metavar=_METAVARS.get(option.name, "X"), default=argparse.SUPPRESS, help=text)
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--weights", default="auto", help="auto, embedded, imagenet or a .pth or .safetensors file (default auto)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, onnxruntime, cuda or tensorrt (default auto)")
    group.add_argument("--precision", default="auto", help="auto, fp32, fp16 or bf16 (default auto)")
    group.add_argument("--trace", metavar="FILE", help="write options, losses and times of every iteration as JSON")
    group.add_argument("--save-every", metavar="N", type=int, help="also write OUT-00N.. every N iterations")
    group.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    group.add_argument("--quiet", action="store_true", help="no progress and no messages but errors")
    group.add_argument("--version", action="store_true", help="print the version and stop")
    return parser


_METAVARS = {
    "size": "N", "iterations": "N[,N...]", "scales": "auto|N", "content_weight": "W", "style_weight": "W",
    "tv_weight": "W", "content_layers": "L[,L...]", "style_layers": "L[,L...]", "pooling": "avg|max",
    "init": "content|noise|PATH", "optimizer": "lbfgs|adam", "seed": "N",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 it broke, 2 the user's mistake, 130 interrupted."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.version:
        from . import __version__

        print(__version__)  # noqa: T201
        return 0
    try:
        return _run(given)
    except KeyboardInterrupt:
        return _fail(130, "interrupted before there was a picture")
    except (ValueError, TypeError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        return _fail(2, _line(error))
    except (OSError, MemoryError, ArithmeticError) as error:
        return _fail(1, _line(error))
    except RuntimeError as error:  # BackendError, and what ONNX Runtime and torch raise when a run breaks
        return _fail(1, _line(error))


def _run(given: argparse.Namespace) -> int:
    config = _config(given)
    paths = _paths(given)
    from . import image, provider

    choice("device", given.device, provider.DEVICES)
    choice("precision", given.precision, provider.PRECISIONS)
    if given.device != "auto":
        provider.check(given.device)
    image.check_output(given.out, given.overwrite)
    if given.trace:
        image.check_writable(given.trace)
    content, *styles = [image.load(path) for path in paths]
    logging.basicConfig(level=logging.WARNING if given.quiet else logging.INFO, format="%(message)s", stream=sys.stderr)

    from .stylizer import Stylizer

    stylizer = Stylizer(given.weights, given.device, given.precision)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    last: Step | None = None
    status, message = 0, ""
    try:
        for last in _progress(stylizer.steps(content, styles, config), given.quiet):
            seconds = round(time.perf_counter() - start, 4)
            stages = {name: round(value, 6) for name, value in last.stages.items()}
            row = {"scale": last.scale, "iteration": last.iteration, "loss": last.loss, "seconds": seconds}
            rows.append(row | {"stages": stages})
            if given.save_every and last.iteration % given.save_every == 0:
                image.save(last.image, _numbered(given.out, last.iteration))
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except FloatingPointError as error:
        status, message = 1, str(error)
    if last is not None:
        image.save(last.image, given.out)
        message = message and f"{message}; the picture so far is in {given.out}"
        if given.trace:
            _write_trace(Path(given.trace), stylizer, config, rows)
    return _fail(status, message) if status else 0


def _progress(steps: Any, quiet: bool) -> Any:
    """The steps, with a bar on a terminal."""
    from tqdm import tqdm

    with tqdm(disable=True if quiet else None, unit="it", file=sys.stderr) as bar:
        for step in steps:
            bar.total = step.total
            bar.set_description(f"{step.scale} px", refresh=False)
            bar.set_postfix_str(f"loss {step.loss:.4g}", refresh=False)
            bar.update()
            yield step


def _config(given: argparse.Namespace) -> Config:
    """The Config of the options that were given."""
    values: dict[str, Any] = {}
    for option in options():
        text = getattr(given, option.name, None)
        if text is None:
            continue
        flag = "--" + option.name.replace("_", "-")
        try:
            values[option.name] = _parse(option.name, option.default, text)
        except ValueError as error:
            raise ValueError(f"{flag} {text}: give {_METAVARS[option.name]}") from error
    return Config(**values)


def _parse(name: str, default: Any, text: str) -> Any:
    if name == "iterations":
        counts = tuple(int(part) for part in text.split(","))
        return counts[0] if len(counts) == 1 else counts
    if name == "scales":
        return text if text == "auto" else int(text)
    if isinstance(default, tuple):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return type(default)(text)


def _paths(given: argparse.Namespace) -> list[Any]:
    """Content and styles; checks what argparse cannot."""
    if given.demo:
        if given.content is not None:
            raise ValueError("--demo brings its own pictures: leave CONTENT and STYLE out")
        samples = resources.files("engine.samples")
        paths: list[Any] = [(samples / name).read_bytes() for name in ("content.jpg", "style.jpg")]
        given.out = given.out or "demo.png"
    else:
        if given.content is None or not given.styles:
            raise ValueError("give CONTENT and STYLE, or --demo")
        paths = [given.content, *given.styles]
        if paths.count("-") > 1:
            raise ValueError("only one picture can come from standard input")
    if given.out is None:
        raise ValueError("give the picture to write with -o OUT")
    if given.save_every is not None and given.save_every < 1:
        raise ValueError(f"--save-every {given.save_every}: give a number from 1")
    if given.save_every and given.out == "-":
        raise ValueError("--save-every needs a file name for -o, not a pipe")
    return paths


def _numbered(out: str, iteration: int) -> str:
    path = Path(out)
    return str(path.with_name(f"{path.stem}-{iteration:05d}{path.suffix}"))


def _write_trace(path: Path, stylizer: Any, config: Config, rows: list[dict[str, Any]]) -> None:
    from dataclasses import asdict

    from . import __version__
    from .image import atomic

    record = {
        "version": __version__,
        "device": stylizer.device,
        "precision": stylizer.precision,
        "weights": stylizer.weights_name,
        "config": asdict(config),
        "steps": rows,
    }
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1))


def _line(error: BaseException) -> str:
    """An exception as one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(status: int, message: str) -> int:
    print(f"{_NAME}: {message}", file=sys.stderr)  # noqa: T201
    return status


if __name__ == "__main__":
    sys.exit(main())
