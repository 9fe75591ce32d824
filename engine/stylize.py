"""`python -m engine.stylize CONTENT STYLE [STYLE ...] -o OUT`: the command line.

Everything heavy is imported after the options have been read, so that `--help` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__, samples
from .config import DEVICES, FRAME_ITERATIONS, PRECISIONS, STARTS, TEMPORAL_WEIGHT, Config, options
from .export.commands import Parser, choice, install_line, wrong_file
from .jobs import (
    BREAKS,
    Job,
    brief,
    check_apart,
    ended_softly,
    fail,
    is_frame,
    is_video,
    place,
    product,
    same_file,
)
from .presets import PRESETS, check_weights

_CHECKPOINT_EVERY = 60.0  # seconds
_NAME = "engine.stylize"
_LOGGER = logging.getLogger("engine")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(_NAME, "Paint the content picture in the style of the others (Gatys, Ecker, Bethge 2015).")
    parser.add_argument(
        "content",
        nargs="?",
        metavar="CONTENT",
        help="picture to paint, a video, or a folder of its frames; - reads a pipe; none: a texture",
    )
    parser.add_argument(
        "styles",
        nargs="*",
        metavar="STYLE",
        help="picture whose style is taken, or a file of --save-targets; none: inverts the content's features",
    )
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT",
        help="picture to write: png, jpg, webp, tif, bmp; - writes a PNG pipe; of a video mp4, m4v, mov, mkv, webm, or "
        "a folder; with --contents a folder, or a pattern with {content} and {style}; pictures that are there already "
        "are left alone",
    )
    parser.add_argument("--demo", action="store_true", help="use the bundled sample pair")
    group = parser.add_argument_group("what is optimised")
    names = ", ".join(PRESETS)
    group.add_argument("--preset", metavar="X", help=f"options of another program, where none are given: {names}")
    for option in options():
        default, switch = option.default, isinstance(option.default, bool)
        if switch:
            default = "on" if default else "off"
        elif isinstance(default, tuple):
            default = ",".join(dict(default))
        text = option.metadata["help"] + (f" (default {default})" if default != "" else "")
        kind = {"action": argparse.BooleanOptionalAction} if switch else {"metavar": _METAVARS.get(option.name, "X")}
        group.add_argument(_flag(option.name), default=argparse.SUPPRESS, help=text, **kind)
    group.add_argument(
        "--mask", action="append", metavar="MASK[:MASK]",
        help="once for each STYLE: keeps it to the white part of a mask of the content; after the colon, the part of "
        "the style that it is taken from; the word alpha is the picture's own",
    )  # fmt: skip
    group.add_argument(
        "--freeze", metavar="MASK", help="pixels of the content in the mask stay as they are, and fade into the others"
    )
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--weights", default="auto", help="auto, embedded, imagenet or a .pth or .safetensors file (default auto)"
    )
    group.add_argument(
        "--device", default="auto", help="auto, cpu, onnxruntime, cudnn, cuda or tensorrt (default auto)"
    )
    group.add_argument("--precision", default="auto", help="auto, fp32, fp16 or bf16 (default auto)")
    group.add_argument("--trace", metavar="FILE", help="write options, losses and times of every iteration as JSON")
    group.add_argument("--plot", metavar="FILE", help="draw the losses into a picture (extra plot)")
    group.add_argument("--progress", metavar="X", default="auto", help=f"{_PROGRESS} (default auto)")
    group.add_argument("--forecast", action="store_true", help="say how much memory the run will take, and stop")
    group.add_argument("--save-every", metavar="N", type=int, help="also write OUT-00N.. every N iterations")
    group.add_argument("--save-targets", metavar="FILE", help="also keep what is used of the STYLE, as .safetensors")
    group.add_argument("--overwrite", action="store_true", help="replace OUT and what is written beside it")
    group.add_argument("--checkpoint", metavar="FILE", help="keep the run here, to be resumed; removed when it is done")
    group.add_argument(
        "--checkpoint-every",
        metavar="S",
        type=float,
        help=f"seconds between checkpoints (default {_CHECKPOINT_EVERY:g})",
    )
    group.add_argument("--resume", metavar="FILE", help="go on from a checkpoint of the same pictures and options")
    group.add_argument(
        "--grid", metavar="OPTION=X,X..", nargs="+", help="a contact sheet over all combinations of these options"
    )
    group.add_argument(
        "--replay",
        metavar="FILE",
        help="make this picture again, by its manifest; CONTENT and STYLE only if they moved",
    )
    many = parser.add_argument_group("many pictures: every content with every style, instead of CONTENT and STYLE")
    many.add_argument("--contents", metavar="X", nargs="+", help="files, folders or quoted patterns of contents")
    many.add_argument("--styles", dest="style_list", metavar="X", nargs="+", help="the same of styles")
    many.add_argument("--shard", metavar="I/N", help="make part I of N only, for N machines")
    many.add_argument("--jobs", metavar="N", type=int, default=1, help="pictures at a time (default 1)")
    moving = parser.add_argument_group("a video, or a folder of frames, as CONTENT; OUT is a video or a folder")
    moving.add_argument(
        "--frame-iterations",
        metavar="N",
        type=int,
        help=f"evaluations of a frame behind another (default {FRAME_ITERATIONS})",
    )
    moving.add_argument(
        "--temporal-weight",
        metavar="W",
        type=float,
        help=f"weight of the loss that holds a frame to the one before (default {TEMPORAL_WEIGHT:g})",
    )
    group.add_argument("--quiet", action="store_true", help="no progress, and no messages but warnings and errors")
    group.add_argument("--version", action="store_true", help="print the version and stop")
    return parser


_PROGRESS = "auto (a bar on a terminal), none, or json (a line for each iteration, or frame, on stderr)"
_METAVARS = {
    "size": "N|original|WxH", "style_loss": "gram|wasserstein|shifted", "style_blend": "W,W[,...]",
    "style_scale": "F[,F...]", "style_size": "auto|N", "iterations": "N[,N...][,...]", "scales": "auto|N",
    "content_weight": "W", "style_weight": "W", "tv_weight": "W", "tv_power": "F",
    "tv_form": "mean|sum|block|nine-point", "content_loss": "mean|sum", "pixel_range": "auto|0-255|0-256",
    "content_layers": "auto|L[:W][,...]", "style_layers": "L[:W][,...]", "pooling": "avg|max",
    "padding": "replicate|reflect|zero", "init": "content|noise|style|PATH", "init_noise": "F",
    "optimizer": "lbfgs|adam", "learning_rate": "F", "history": "auto|N", "window": "auto|N", "average": "F",
    "stop": "F", "seed": "N", "colour": "none|keep-after|keep-before|match|histogram",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 it broke, 2 the user's mistake, 130 interrupted."""
    parser = _parser()
    words = sys.argv[1:] if arguments is None else arguments
    # Options may stand between CONTENT and STYLE, unless `--` has an end of them.
    given = parser.parse_args(words) if "--" in words else parser.parse_intermixed_args(words)
    if given.version:
        print(__version__)  # noqa: T201
        return 0
    level = _LOGGER.level
    try:
        with ended_softly():
            return _run(given)
    except KeyboardInterrupt:
        return fail(_NAME, 130, "interrupted")
    except (ValueError, TypeError) as error:
        return fail(_NAME, 2, brief(error))
    except BREAKS as error:  # BackendError is a RuntimeError
        return fail(_NAME, 2 if wrong_file(error) else 1, brief(error))
    finally:
        _LOGGER.setLevel(level)


def _run(given: argparse.Namespace) -> int:
    _check(given)
    if given.quiet or sys.stderr is None:
        given.progress = "none"
    config = Config() if given.replay else _config(given)
    start = config.start_file
    if start and re.fullmatch(r"\w+", start) and not Path(start).exists():  # a word, misspelt
        choice("init", start, STARTS)
    sources = _sources(given)
    from . import painting, provider

    choice("device", given.device, DEVICES)
    choice("precision", given.precision, PRECISIONS)
    if given.device != "auto":
        provider.check(given.device)
    verbose = not given.quiet and given.progress != "json"
    if not verbose:
        _LOGGER.setLevel(logging.WARNING)  # of a download, too
    handler = logging.StreamHandler()
    handler.addFilter(_Once())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(message)s", handlers=[handler])
    if given.contents:
        from . import batches

        jobs = product(given.contents, given.style_list, given.out)
        _warn_of_idle(given, [config], content=True, styles=1)
        status, message = batches.run(jobs, config, given)
        return fail(_NAME, status, message) if status else 0
    if _is_moving(given):
        from . import video

        _warn_of_idle(given, [config], content=True, styles=0 if "none" in sources else len(sources) - 1)
        status, message = video.make(given, sources[1:], config)
        return fail(_NAME, status, message) if status else 0
    record = None
    if given.replay:
        from . import replay

        record, folder = replay.read(given.replay), Path(given.replay).parent
        sources = sources or replay.sources(record, folder)
        config, job = replay.inputs(record, folder, sources, given.out)
        replay.take_engine(record, folder, given)
    else:
        job = Job(sources[0], tuple(sources[1:]), given.out, _masks(given.mask), given.freeze)
    besides = [each for each in _files(job.masks, job.freeze) if each != "alpha"] + _files(config.start_file)
    if not given.forecast:
        _check_files(given, [*_files(*sources), *besides])
    if not given.replay:
        job = painting.loaded(job)

    from . import sheet
    from .stylizer import Stylizer

    grid = sheet.axes(given.grid, _parse) if given.grid else []
    cells = sheet.configs(config, grid)  # before the weights are read: mistakes in the values are told now
    content, styles, axes = job.content is not None, len(job.style or ()), [name for name, _ in grid]
    _warn_of_idle(given, [each for _, each in cells], axes, content=content, styles=styles)
    stylizer = Stylizer(given.weights, given.device, given.precision, keep_networks=len(cells) > 1)
    if given.preset:
        check_weights(given.preset, stylizer.weights_kind)
    if record:
        replay.check_engine(record, stylizer, config)
    if given.forecast:
        print(stylizer.forecast(job.content, job.style, config, masks=job.masks, freeze=job.freeze))  # noqa: T201
        return 0
    if given.save_targets:
        painting.begin(stylizer, job, config)  # mistakes are told before anything is written
        _save_targets(given, stylizer, job, config)
    if grid:
        status, message = sheet.make(stylizer, job, cells, len(grid[-1][1]), given)
    else:
        status, message = painting.paint(stylizer, job, config, given)
    return fail(_NAME, status, message) if status else 0


def _warn_of_idle(
    given: argparse.Namespace, configs: Sequence[Config], axes: Sequence[str] = (), *, content: bool, styles: int
) -> None:
    """Name the options that were given, or are `axes` of a grid, and have no effect in any of the `configs`."""
    first, *others = (config.idle(content=content, styles=styles) for config in configs)
    for name, reason in first.items():
        kept = given.save_targets and name.startswith("style_")  # what is saved depends on it
        if (name in axes or hasattr(given, name)) and not kept and all(name in other for other in others):
            _LOGGER.warning("%s has no effect: %s", _flag(name), reason)


def _check(given: argparse.Namespace) -> None:
    """Raise ValueError for options that do not go together."""
    listed, moving = bool(given.contents or given.style_list), _is_moving(given)
    many = "--contents" if listed else "a video" if moving else "--grid"
    if listed and not (given.contents and given.style_list):
        raise ValueError("--contents and --styles belong together")
    if listed and (given.content is not None or given.demo):
        raise ValueError("--contents and --styles name the pictures: leave CONTENT, STYLE and --demo out")
    if listed or moving or given.grid:
        single = ["trace", "plot", "checkpoint", "checkpoint_every", "resume", "replay", "forecast", "mask", "freeze"]
        others = ("grid",) if listed else ("grid", "save_every") if moving else ("save_every",)
        for name in (*single, "save_targets", *others):
            if getattr(given, name):
                raise ValueError(f"{_flag(name)} is for one picture, not for {many}")
    for name, default in (("frame_iterations", FRAME_ITERATIONS), ("temporal_weight", TEMPORAL_WEIGHT)):
        if getattr(given, name) is None:
            setattr(given, name, default)
        elif not moving:
            raise ValueError(f"{_flag(name)} is for a video: give one as CONTENT, or a folder of its frames")
    if not 0 <= given.temporal_weight < float("inf"):
        raise ValueError(f"--temporal-weight {given.temporal_weight}: give a number from 0")
    if given.frame_iterations < 1:
        raise ValueError(f"--frame-iterations {given.frame_iterations}: give a number from 1")
    if not listed and (given.shard or given.jobs != 1):
        raise ValueError("--shard and --jobs are for --contents")
    if given.jobs < 1:
        raise ValueError(f"--jobs {given.jobs}: give a number from 1")
    if given.checkpoint_every is None:
        given.checkpoint_every = _CHECKPOINT_EVERY
    elif not given.checkpoint:
        raise ValueError("--checkpoint-every is for --checkpoint: give that too")
    if not given.checkpoint_every >= 0:
        raise ValueError(f"--checkpoint-every {given.checkpoint_every}: give seconds, from 0")
    choice("--progress", given.progress, ("auto", "none", "json"))
    if given.replay:
        for name in ("preset", "mask", "freeze", *(option.name for option in options())):
            if getattr(given, name, None) is not None:
                raise ValueError(f"--replay takes the options of the manifest: leave {_flag(name)} out")
    if given.save_targets and Path(given.save_targets).suffix != ".safetensors":
        raise ValueError(f"--save-targets {given.save_targets}: give a name that ends in .safetensors")
    if given.plot and importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(f"--plot: matplotlib is missing: {install_line('plot')}")


def _is_moving(given: argparse.Namespace) -> bool:
    """Whether CONTENT is a video, or a folder of frames."""
    content = given.content
    return content not in (None, "none", "-") and (is_video(content) or Path(content).is_dir())


def _masks(given: list[str] | None) -> list[Any] | None:
    """The masks of --mask, CONTENT or CONTENT:STYLE; a file whose name has a colon is itself."""
    if given is None:
        return None
    found: list[Any] = []
    drive = r"(?:[A-Za-z]:[\\/])?" if sys.platform == "win32" else ""
    for text in given:
        *content, style = re.findall(drive + "[^:]+", text) or [text]
        found.append((":".join(content), style) if content and not Path(text).exists() else text)
    return found


def _files(*sources: Any) -> list[str]:
    """The names of files among what a run reads as pictures, and in lists of it."""
    found = []
    for each in sources:
        found += [each] if isinstance(each, str) else _files(*each) if isinstance(each, list | tuple) else []
    return found


def _check_files(given: argparse.Namespace, pictures_read: Sequence[str]) -> None:
    """Raise ValueError or OSError if a file that is to be written cannot be, or is there or needed already."""
    from . import image, manifest, painting

    pictures = image.written(given.out)
    resumed = bool(given.resume and given.checkpoint and same_file(given.resume, given.checkpoint))
    names = ("trace", "plot", "save_targets", "checkpoint")
    own = {_flag(name): getattr(given, name) for name in names if getattr(given, name)}
    needed = [*pictures_read, *([given.replay, str(manifest.beside(given.replay))] if given.replay else [])]
    replaced = needed
    if given.overwrite:  # they are read before OUT takes their place
        replaced = [each for each in replaced if not any(same_file(each, path) for path in pictures)]
    read = [("a picture to read", each) for each in replaced] + [("--weights", given.weights)]
    if given.resume and not resumed:
        read.append(("--resume", given.resume))
    check_apart([*zip(("OUT", "OUT.json"), pictures, strict=False), *own.items()], read)
    image.check_output(given.out, given.overwrite)
    for flag, path in own.items():
        image.check_writable(path, given.overwrite or flag == "--checkpoint")
    if given.checkpoint and Path(given.checkpoint).exists() and not (resumed or given.overwrite):
        raise ValueError(f"{given.checkpoint} exists already: --resume goes on from it, --overwrite replaces it")
    if given.save_every:
        for each in (*needed, *own.values()):
            if is_frame(each, {place(given.out)}, given.save_every):
                raise ValueError(f"{each} has the name of a frame of --save-every: give OUT or the file another one")
    if given.save_every and not (given.overwrite or given.resume):
        painting.check_frames(given.out, given.save_every)
    if given.plot:
        painting.check_plot(given.plot)


def _save_targets(given: argparse.Namespace, stylizer: Any, job: Job, config: Config) -> None:
    from .image import Picture

    if len(job.styles) != 1 or not isinstance(job.styles[0], Picture):
        raise ValueError("--save-targets keeps what is used of one STYLE: give one, a picture")
    if config.colour not in ("none", "keep-after"):
        raise ValueError(f"--save-targets keeps the STYLE as it is, --colour {config.colour} changes it")
    if job.content is not None:
        config = config.sized(max(job.content.size))
    mask = (job.masks or [""])[0]
    stylizer.targets(job.styles[0], config, mask=mask[1] if isinstance(mask, tuple) else None).save(given.save_targets)


def _config(given: argparse.Namespace) -> Config:
    """The Config of the options that were given."""
    values = dict(PRESETS[choice("preset", given.preset, PRESETS)]) if given.preset else {}
    for option in options():
        text = getattr(given, option.name, None)
        if text is None:
            continue
        try:
            values[option.name] = _parse(option.name, option.default, text)
        except ValueError as error:
            raise ValueError(f"{_flag(option.name)} {text}: give {_METAVARS[option.name]}") from error
    return Config(**values)


def _parse(name: str, default: Any, text: Any) -> Any:
    if isinstance(default, bool):
        if text not in (True, False, "true", "false"):
            raise ValueError("give true or false")
        return text in (True, "true")
    if name == "iterations":
        counts = tuple(part if part == "..." else int(part) for part in text.split(","))
        return counts[0] if len(counts) == 1 else counts
    if name == "size" and "x" in text:
        width, height = text.split("x")
        return int(width), int(height)
    if name in ("style_blend", "style_scale"):
        numbers = tuple(float(part) for part in text.split(","))
        return numbers if name == "style_blend" or len(numbers) > 1 else numbers[0]
    if name in ("scales", "size", "style_size", "history", "window"):
        return text if text in ("auto", "original") else int(text)
    if name in ("content_layers", "style_layers"):
        if text == default:
            return text
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return type(default)(text)


def _sources(given: argparse.Namespace) -> list[Any]:
    """Content and styles of a single picture; checks what argparse cannot."""
    sources: list[Any] = []
    if given.demo:
        if given.content is not None:
            raise ValueError("--demo brings its own pictures: leave CONTENT and STYLE out")
        sources = [*samples.pair()]
        given.out = given.out or "demo.png"
    elif not given.contents and (given.content is not None or not given.replay):
        if given.content is None or not given.styles:
            raise ValueError("give CONTENT and STYLE, or --demo")
        sources = [given.content, *given.styles]
        if "none" in given.styles and len(given.styles) > 1:
            raise ValueError("none stands for all styles: give it alone")
        if Path(given.content).suffix == ".safetensors":
            raise ValueError(f"{given.content} is no picture: style targets take the place of a STYLE")
    if _files(*sources, _masks(given.mask), given.freeze, getattr(given, "init", None)).count("-") > 1:
        raise ValueError("only one picture can come from standard input")
    if given.out is None and not given.forecast:
        raise ValueError("give the picture to write with -o OUT")
    if given.save_every is not None and given.save_every < 1:
        raise ValueError(f"--save-every {given.save_every}: give a number from 1")
    if given.save_every and given.out == "-":
        raise ValueError("--save-every needs a file name for -o, not a pipe")
    return sources


class _Once(logging.Filter):
    """Lets a message pass once, however many pictures it is true of."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        said = message in self._said
        self._said.add(message)
        return not said


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
