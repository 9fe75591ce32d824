"""`python -m engine.doctor`: what of this machine the engine can use, and what it wants for the rest.

Each device that is here paints a small picture first, so what is said to work does.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import samples
from .config import DEVICES, Config
from .export.commands import Parser
from .jobs import BREAKS, brief, ended_softly, fail

if TYPE_CHECKING:
    from .stylizer import Stylizer

_NAME = "engine.doctor"
_SMALL = Config(size=64, scales=1, iterations=5)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the exit status is 0, 1 if nothing can be painted with the defaults, 130 if interrupted."""
    try:
        with ended_softly():
            Parser(_NAME, "Says which devices and weights the engine can use on this machine.").parse_args(argv)
            return _report()
    except KeyboardInterrupt:
        return fail(_NAME, 130, "interrupted")


def _report() -> int:
    from . import manifest

    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions().items())
    _say("versions", f"{versions}; {platform.system()} {platform.machine()}")
    _say("memory", _memory())
    for device in DEVICES[1:]:
        _say(device, _device(device))
    works, found = _defaults()
    _say("defaults", found)
    _say("cache", _cache())
    return int(not works)


def _say(what: str, found: str) -> None:
    sys.stdout.write(f"{what:<11} {found}\n")
    sys.stdout.flush()


def _memory() -> str:
    import torch

    from .forecast import available, short

    left = available("cpu")
    return f"{'unknown' if left is None else f'{short(left)} available'}; {torch.get_num_threads()} threads"


def _device(device: str) -> str:
    from . import provider
    from .export.ort import BackendError
    from .forecast import available, short

    try:
        provider.check(device)
        stylizer, seconds = _painter("embedded", device)
    except BackendError as error:
        return brief(error).removeprefix(f"device {device}: ")
    except (ValueError, *BREAKS) as error:
        return f"breaks: {brief(error)}"
    found = f"works: {stylizer.precision}, a first small picture in {seconds:.1f} s"
    if device not in provider.GPUS:
        return found
    import torch

    left = available("cudnn")
    return f"{found}; {torch.cuda.get_device_name(0)}{'' if left is None else f', {short(left)} available'}"


def _painter(weights: str, device: str) -> tuple[Stylizer, float]:
    """A Stylizer that has painted a small picture, and the seconds that it took from the start."""
    from .stylizer import Stylizer

    start = time.perf_counter()
    stylizer = Stylizer(weights, device, keep_networks=False)
    stylizer(*samples.pair(), _SMALL)
    return stylizer, time.perf_counter() - start


def _defaults() -> tuple[bool, str]:
    """Whether a run without options works, and what it takes."""
    try:
        stylizer, _ = _painter("auto", "auto")
    except (ValueError, *BREAKS) as error:
        return False, brief(error)
    hint = "; --weights imagenet downloads better ones once" if stylizer.weights_name == "embedded" else ""
    return True, f"--device {stylizer.device} --precision {stylizer.precision} --weights {stylizer.weights_name}{hint}"


def _cache() -> str:
    from .export.weights import cache_folder

    folder = cache_folder()
    whose = f"{folder} ({'STYLIZE_HOME' if os.environ.get('STYLIZE_HOME') else 'STYLIZE_HOME sets another one'})"
    try:
        made = next(each for each in (folder, *folder.parents) if each.exists())
        with tempfile.TemporaryFile(dir=made):
            pass
    except OSError as error:
        return f"{whose} cannot be written: {error.strerror or brief(error)}"
    return whose


if __name__ == "__main__":
    sys.exit(main())
