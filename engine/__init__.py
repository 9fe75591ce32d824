"""Neural style transfer by optimisation (Gatys, Ecker, Bethge 2015), as an engine to embed.

from engine import Config, Stylizer

stylizer = Stylizer()
stylizer("content.jpg", "style.jpg", Config(size=512)).save("out.png")
"""

from __future__ import annotations

from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if util.find_spec("engine.export") is None:  # a checkout that is not installed: its folders stand beside this one
    __path__.append(str(Path(__file__).parent.parent))

from .config import Config
from .presets import preset

if TYPE_CHECKING:
    from .export.ort import BackendError as BackendError
    from .result import Result as Result
    from .result import Score as Score
    from .result import Step as Step
    from .stylizer import Stylizer as Stylizer
    from .targets import Targets as Targets

__all__ = ["BackendError", "Config", "Result", "Score", "Step", "Stylizer", "Targets", "__version__", "preset"]


def __getattr__(name: str) -> Any:
    """Import the rest when it is first asked for: torch takes seconds, and `--help` does not need it."""
    if name == "BackendError":
        from .export.ort import BackendError

        return BackendError
    if name in __all__:
        from . import stylizer

        return getattr(stylizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
