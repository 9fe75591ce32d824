"""Gram matrices and losses, each with its gradient.

Every operation takes torch tensors: on the CPU it runs through BLAS, on a GPU through the CUDA source beside it, on the
current stream and without a host synchronisation. `<operation>_reference` is the same formula in NumPy, in the dtype
of its input, and serves as the oracle.
"""

from .content import content_gradient, content_loss
from .gram import gram
from .style import style_gradient, style_loss
from .total_variation import total_variation

__all__ = ["content_gradient", "content_loss", "gram", "style_gradient", "style_loss", "total_variation"]
