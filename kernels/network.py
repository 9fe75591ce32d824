"""What stands between the convolutions of VGG-19 on a GPU, and the first of them, one launch each.

Activations are (1, C, H, W) fp32, fp16 or bf16 in NHWC order, C a multiple of 8; the image is (1, 3, H, W) fp32. Sums
are fp32. `nhwc` has the same steps for a CPU.
"""

from __future__ import annotations

from torch import Tensor

from . import _cuda
from .layers import Term

PADDINGS = ("zero", "reflect", "replicate", "circular")  # what a convolution sees beyond the border
COLOURS = 4  # channels of the image as cuDNN's first convolution reads it, in fp32; the last one is zero
EIGHT = 8  # channels of the gradient as the last convolution writes it in fp32; three are of use
_WAYS = ("", "avg", "max")
CHAINED = 128  # channels for which `mask` makes the share of the style loss itself; for more, cuBLAS is faster
TAPS, FILLED = 27, 32  # what a position sees in the first convolution: places and colours; with zeros
_POSITIONS = 128  # that a block takes at a time to make that share
_RESIDENT = 2  # blocks on a multiprocessor that do so, as in network.cu


def centre(image: Tensor, means: Tensor, out: Tensor, padding: str) -> None:
    """Write the image minus means (3,) into `out` (1, COLOURS, H + 2 f, W + 2 f), with a frame of f lines, 0 or 1."""
    size = image.shape[2:]
    _launch("image", out, out.shape[2] * out.shape[3], image, means, out, *size, *_frame(out, size), _index(padding))


def convolve(
    image: Tensor, means: Tensor, kernel: Tensor, bias: Tensor, out: Tensor, padding: str, rectified: bool
) -> None:
    """Write the first convolution of the image minus means (3,), or its ReLU, into `out` (1, 64, H, W) of 16 bits.

    `kernel` (64, FILLED) is by channel, place and colour, filled up with zeros; `bias` has 64 elements.
    """
    size = image.shape[2:]
    given = (image, means, kernel, bias, out, *size, _index(padding), int(rectified))
    _launch("convolution", out, size[0] * size[1], *given)


def wrap(source: Tensor, out: Tensor) -> None:
    """Write (1, C, H, W) into `out` (1, C, H + 2, W + 2), whose frame is the opposite side."""
    _, channels, height, width = source.shape
    _launch("wrap", out, out.numel() // EIGHT, source, out, height, width, channels)


def pool(source: Tensor, out: Tensor, pooling: str) -> None:
    """Write means or maxima of 2 x 2 positions into `out` (1, C, H / 2, W / 2); `pooling` is avg or max."""
    _, channels, height, width = source.shape
    _launch("pool", out, out.numel() // EIGHT, source, out, height, width, channels, _WAYS.index(pooling))


def mask(
    incoming: Tensor | None,
    own: Tensor | None,
    behind: Tensor | None,
    features: Tensor,
    out: Tensor,
    pooling: str = "",
    term: Term | None = None,
    ratio: Tensor | None = None,
) -> None:
    """The VJP of a ReLU, and of the pooling above it if there is one: (features > 0) (ratio incoming + own) + behind.

    `incoming` has come from above, (1, C, H, W) or with `pooling` (1, C, H / 2, W / 2). With avg each of its values
    goes to four features, with max to the largest of the four, the first of them (the quarter of a mean is in the
    weights above it). `own` is what the losses add at the ReLU, `behind` what they add at the convolution before it.
    `out` may be `incoming` if nothing is pooled. `term` is what a style or a content loss adds at the ReLU and nobody
    has made yet; that of a style for 16-bit features with CHAINED channels where nothing is pooled. `ratio`, 0-dim
    fp32, is 1 where it is not given.
    """
    if term is not None and term.lifted is not None:
        assert not pooling
        _style(incoming, own, behind, features, out, term, ratio, None)
        return
    _, channels, height, width = features.shape
    content, factors = (term.content, term.factors) if term else (None, None)
    given = (incoming, own, behind, features, content, factors, ratio, out)
    _launch("mask", out, out.numel() // EIGHT, *given, height, width, channels, _WAYS.index(pooling))


def first(
    incoming: Tensor | None,
    own: Tensor | None,
    behind: Tensor | None,
    features: Tensor,
    taps: Tensor,
    products: Tensor,
    term: Term | None = None,
    ratio: Tensor | None = None,
) -> None:
    """`mask` at the first convolution, for 16-bit features (1, 64, H, W), and half of the VJP of that convolution.

    Writes products (TAPS, plane) of what `mask` would write, at each position, with taps (FILLED, 64), the kernel
    of the VJP by place, colour and channel; plane is a multiple of 8, at least H W. `gather` is the other half.
    """
    _style(incoming, own, behind, features, products, term, ratio, taps)


def _style(
    incoming: Tensor | None,
    own: Tensor | None,
    behind: Tensor | None,
    features: Tensor,
    out: Tensor,
    term: Term | None,
    ratio: Tensor | None,
    taps: Tensor | None,
) -> None:
    _, channels, height, width = features.shape
    blocks = min(_RESIDENT * _cuda.processors(out.device), -(-height * width // _POSITIONS))
    kernel = f"network_style<{_cuda.ELEMENTS[out.dtype]}, {channels}>"
    assert term is None or term.content is None
    factors, lifted = (term.factors, term.lifted) if term else (None, None)
    given = (incoming, own, behind, features, out, height, width, factors, lifted, ratio, taps)
    _cuda.launch("network", kernel, (blocks,), *given, 0 if taps is None else out.shape[1])


def gather(products: Tensor, gradient: Tensor, padding: str) -> None:
    """What `first` leaves -> gradient (1, 3, H, W) fp32, through `centre` as well."""
    _, _, height, width = gradient.shape
    size = (height, width, _index(padding))
    _launch("gather", products, height * width, products, products.shape[1], gradient, *size)


def uncentre(source: Tensor, gradient: Tensor, padding: str) -> None:
    """The VJP of `centre`: cotangents (1, EIGHT, H + 2 f, W + 2 f) -> gradient (1, 3, H, W) fp32."""
    size = gradient.shape[2:]
    frame = _frame(source, size)
    _launch("gradient", source, gradient.numel(), source, gradient, *size, *frame, _index(padding))


def _frame(framed: Tensor, size: tuple[int, ...]) -> tuple[int]:
    return ((framed.shape[2] - size[0]) // 2,)


def _index(padding: str) -> int:
    return PADDINGS.index(padding)


def _launch(kernel: str, typed: Tensor, count: int, *arguments: _cuda.Argument) -> None:
    element = _cuda.ELEMENTS[typed.dtype]
    _cuda.launch("network", f"network_{kernel}<{element}>", (-(-count // _cuda.THREADS),), *arguments)
