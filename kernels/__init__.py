"""The arithmetic between the two graphs: Gram matrices, losses with their gradients, and the optimisers.

Everything takes torch tensors: on the CPU it runs through BLAS, or the `Products` of a runtime, on a GPU through the
CUDA sources beside it, on the current stream and without a host synchronisation, but for the losses of features in
pieces. `<operation>_reference` is the same formula in NumPy, in the dtype of its input, and serves as the oracle.
"""

from ._cuda import own_stream, processors
from ._graphs import Counters, Recorded, announce_no_graph, capturing, seconds, stand_captures
from .adam import RATE, Adam
from .layers import Layers, Term, gram, losses, memory_of_products
from .lbfgs import DIVERGED, Lbfgs, pairs
from .pixels import Pixels
from .summed import SCRATCH, Layer, Products, Summed
from .temporal import Temporal
from .trail import Trail
from .wasserstein import STRIP, Wasserstein, exact_gram, exact_mean

__all__ = [
    "DIVERGED",
    "RATE",
    "SCRATCH",
    "STRIP",
    "Adam",
    "Counters",
    "Layer",
    "Layers",
    "Lbfgs",
    "Pixels",
    "Products",
    "Recorded",
    "Summed",
    "Temporal",
    "Term",
    "Trail",
    "Wasserstein",
    "announce_no_graph",
    "capturing",
    "exact_gram",
    "exact_mean",
    "gram",
    "losses",
    "memory_of_products",
    "own_stream",
    "pairs",
    "processors",
    "seconds",
    "stand_captures",
]
