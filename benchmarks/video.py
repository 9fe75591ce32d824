"""`python -m benchmarks.video`: how much a video flickers, and what a frame takes, beside frames painted on their own.

A window glides over a photograph and comes nearer, so the motion is known, and the engine has to find it. Flicker is
the mean difference of a frame from the one before, moved by the known motion, in pixel values from 0 to 1; that of the
content is the least there can be. The loss is that of the last frame, without the temporal term. Frames on their own
are default runs. Writes the figures and the frames.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import map_coordinates

from engine import Config, Stylizer, provider, samples, sheet
from engine import image as images
from engine.video import Video

from . import machine, quality

FRAMES = 8
PAN, ZOOM = (2.3, 0.9), 1.01  # pixels of the window and times as near, from frame to frame


def main(argv: Sequence[str] | None = None) -> int:
    parser = machine.parser("video", __doc__)
    parser.add_argument("--size", type=int, default=192, help="long side in pixels (default 192)")
    parser.add_argument("--device", default="cpu", help="of the engine (default cpu)")
    parser.add_argument("--out", type=Path, default=machine.ROOT / "benchmarks" / "results", help="folder")
    args = parser.parse_args(argv)
    stylizer, config = Stylizer("embedded", args.device), Config(size=args.size)
    place = "cuda" if stylizer.device in provider.GPUS else "cpu"
    report: dict[str, Any] = {"commit": machine.commit(), "device": machine.device_name(place)}
    report |= {
        "versions": machine.versions(),
        "engine_device": stylizer.device,
        "engine_precision": stylizer.precision,
        "size": args.size,
        "pairs": {},
    }
    cells = []
    for name, (photograph, style) in pairs().items():
        window = (args.size, round(args.size / 1.5))
        frames = [seen(photograph, window, i) for i in range(FRAMES)]
        found: dict[str, Any] = {"content": {"flicker": flicker(frames, photograph, window)}}
        shown = {"content": frames}
        painter = Video(stylizer, style, config)
        ways: dict[str, Callable[[NDArray[np.uint8]], NDArray[np.float32]]] = {
            "alone": lambda frame, style=style: stylizer(frame, style, config).last.picture.rgb,
            "video": lambda frame, painter=painter: painter(frame).picture.rgb,
        }
        made: dict[str, list[NDArray[np.float32]]] = {way: [] for way in ways}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for frame in frames:  # in turns
            for way, paint in ways.items():
                start = time.perf_counter()
                made[way].append(paint(frame))
                seconds[way].append(time.perf_counter() - start)
        for way, pictures in made.items():
            shown[way] = [np.rint(255 * each).astype(np.uint8) for each in pictures]
            row = found[way] = {
                "flicker": flicker(shown[way], photograph, window),
                "loss": stylizer.evaluate(pictures[-1], frames[-1], style, config).loss,
                "seconds_first": round(seconds[way][0], 2),
                "seconds_later": round(statistics.median(seconds[way][1:]), 2),
            }
            print(f"{name}, {way}: flicker {row['flicker']:.4f}, loss {row['loss']:.4f}, ", end="")
            print(
                f"{row['seconds_first']} s for the first frame, {row['seconds_later']} for each later one", flush=True
            )
        report["pairs"][name] = found
        picked = (0, 1, FRAMES // 2, FRAMES - 1)
        cells += [([f"{way} {i + 1}"], Image.fromarray(each[i])) for way, each in shown.items() for i in picked]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{machine.slug(place)}-video-{args.size}.json").write_text(json.dumps(report, indent=1) + "\n")
    sheet.draw(cells, len(picked)).save(args.out / "video.jpg", quality=88)
    return 0


def pairs() -> dict[str, tuple[Image.Image, Any]]:
    """Photograph and style by name."""
    bundled = [images.to_pil(images.load(each)) for each in samples.pair()]
    return {
        "bundled": (bundled[0], bundled[1]),
        "astronaut x mosaic": (quality.photograph("astronaut"), quality.STYLES["mosaic"]()),
    }


def box(photograph: Image.Image, window: tuple[int, int], frame: int) -> tuple[float, float, float]:
    """Left and top edge of the window, and pixels of the photograph in one of the window."""
    scale = min(photograph.width / window[0], photograph.height / window[1]) / 1.3 / ZOOM**frame
    centre = photograph.width * 0.45 + PAN[0] * frame * scale, photograph.height * 0.45 + PAN[1] * frame * scale
    return centre[0] - window[0] * scale / 2, centre[1] - window[1] * scale / 2, scale


def seen(photograph: Image.Image, window: tuple[int, int], frame: int) -> NDArray[np.uint8]:
    """What the window shows in a frame (H, W, 3), with the noise of a camera."""
    left, top, scale = box(photograph, window, frame)
    corners = (left, top, left + window[0] * scale, top + window[1] * scale)
    picture = photograph.convert("RGB").resize(window, Image.Resampling.LANCZOS, corners)
    noise = np.random.default_rng(frame).normal(0, 1.5, (window[1], window[0], 3))
    return np.clip(np.asarray(picture) + noise, 0, 255).round().astype(np.uint8)


def flicker(frames: Sequence[NDArray[np.uint8]], photograph: Image.Image, window: tuple[int, int]) -> float:
    """Mean difference of the frames from those before, moved by the known motion, where both show the same."""
    found = []
    for i in range(1, len(frames)):
        (left, top, scale), (old_left, old_top, old_scale) = (box(photograph, window, each) for each in (i, i - 1))
        y, x = np.indices((window[1], window[0]), np.float64)
        x = (left + (x + 0.5) * scale - old_left) / old_scale - 0.5
        y = (top + (y + 0.5) * scale - old_top) / old_scale - 0.5
        there = (x >= 0) & (x <= window[0] - 1) & (y >= 0) & (y <= window[1] - 1)
        planes = np.moveaxis(frames[i - 1] / 255, 2, 0)
        moved = np.stack([map_coordinates(plane, (y[there], x[there]), order=1) for plane in planes], 1)
        found.append(abs(frames[i][there] / 255 - moved).mean())
    return float(np.mean(found))


if __name__ == "__main__":
    sys.exit(main())
