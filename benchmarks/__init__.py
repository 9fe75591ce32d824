"""Measurements: the plain PyTorch baseline, the benchmarks, the comparison that fills the ledger in `results/`."""

from importlib import util
from pathlib import Path

import engine

if util.find_spec("engine.kernels") is None:  # a checkout that is not installed: its folders stand beside `engine`
    engine.__path__.append(str(Path(__file__).parent.parent))
