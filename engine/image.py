"""Pictures in and out: path, bytes, PIL image or array -> float32 (1, 3, H, W), sRGB in [0, 1], and back."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import os
import struct
import sys
import tempfile
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from . import manifest
from .jobs import is_video

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

Source = Any  # Picture, path, `-`, bytes, PIL image, or array as `load` says
FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
_READ = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")  # none that runs other programs
MAX_PIXELS = 89_478_485  # of a picture, Pillow's own limit against decompression bombs; $STYLIZE_MAX_PIXELS
_BITS, _PHOTOMETRIC = 258, 262  # TIFF's tags: bits per sample; what zero means
MAX_BYTES = 2**28  # of a file; $STYLIZE_MAX_BYTES
_OPAQUE = ("JPEG", "BMP")  # formats without an alpha channel
_DEEP = "TIFF"  # the format of 16 bits a channel
_LONGEST = {"JPEG": 65500, "WEBP": 16383}  # pixels a side
_pillow_lock = threading.Lock()  # filters of warnings and Pillow's limit are process-wide


@dataclass(frozen=True)
class Picture:
    """An sRGB picture: `rgb` is float32 (H, W, 3) in [0, 1], `alpha` float32 (H, W) in [0, 1] or None.

    `name` is that of its file, without folders.
    """

    rgb: NDArray[np.float32] = field(repr=False)
    alpha: NDArray[np.float32] | None = field(default=None, repr=False)
    name: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    @functools.cached_property
    def opaque(self) -> bool:
        """Whether its alpha hides nothing."""
        return self.alpha is None or bool(self.alpha.min() == 1)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the decoded picture: its size, and its values as float32."""
        state = hashlib.sha256(repr((self.size, self.alpha is None)).encode())
        for plane in (self.rgb, self.alpha):
            if plane is not None:
                state.update(np.ascontiguousarray(plane).data)
        return state.hexdigest()

    @property
    def aspect(self) -> float:
        """Long side divided by short side."""
        return max(self.size) / min(self.size)

    def fit(self, long_side: int) -> tuple[int, int]:
        """(width, height) with this aspect and that long side."""
        short = max(1, round(long_side / self.aspect))  # to the bit what `Config.schedule` reckons with
        return (long_side, short) if self.size[0] >= self.size[1] else (short, long_side)


class _RangeError(ValueError):
    """A picture that is sound, with values that mean no colour."""


def load(source: Source) -> Picture:
    """Read a picture: oriented by its EXIF tag, brought to sRGB by its ICC profile, alpha set apart.

    Files are PNG, JPEG, WEBP, TIFF, BMP, GIF (the first frame), PPM, JPEG 2000 or AVIF. Grey keeps its 16 bits, Pillow
    brings 16-bit colour to 8. Size is checked before anything is decoded, against MAX_BYTES and MAX_PIXELS or the
    environment's STYLIZE_MAX_BYTES and STYLIZE_MAX_PIXELS. Arrays, bool, uint8, uint16 or floats in [0, 1], are grey
    (H, W), colours (H, W, 3), or these and alpha (H, W, 4).

    Raises ValueError if it is not a picture, is damaged or too large, OSError if it cannot be read, TypeError for
    another kind of source.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        if not (source.width and source.height):
            raise ValueError(f"a picture has to have pixels, not {source.width} x {source.height}")
        limit("STYLIZE_MAX_PIXELS", MAX_PIXELS)  # a wrong one is no damage of the picture
        with _told("picture"):
            source.load()
            return _from_pil(source)
    named = isinstance(source, str | os.PathLike) and source != "-"
    with opened(source) as picture:
        return replace(_from_pil(picture), name=Path(source).name if named else None)


@contextlib.contextmanager
def opened(source: Source) -> Iterator[Image.Image]:
    """The picture in a file or in bytes, decoded by Pillow within the limits of `load`; raises what `load` raises.

    What fails while it is in use is told as damage of the file.
    """
    most, pixels = limit("STYLIZE_MAX_BYTES", MAX_BYTES), limit("STYLIZE_MAX_PIXELS", MAX_PIXELS)
    if isinstance(source, bytes | bytearray | memoryview):
        name, data = "picture", bytes(source)
    elif isinstance(source, str) and source == "-":
        if sys.stdin is None:
            raise ValueError("standard input is closed: no picture can be read from it")
        name, data = "standard input", sys.stdin.buffer.read(most + 1)
    elif isinstance(source, str | os.PathLike):
        name = str(source)
        if name.startswith(("http://", "https://")):
            raise ValueError(f"{name}: no address is fetched, give a file")
        with Path(source).open("rb") as file:
            data = file.read(most + 1)
    else:
        raise TypeError(f"a picture is a path, bytes, a PIL image or a NumPy array, not {type(source).__name__}")
    if not data:
        raise ValueError(f"{name} is empty")
    if len(data) > most:
        raise ValueError(f"{name} has more than {most} bytes (STYLIZE_MAX_BYTES)")
    with _told(name):
        with _bounded(pixels):
            picture = Image.open(io.BytesIO(data), formats=_READ)
            picture.load()
        yield picture


@contextlib.contextmanager
def described(path: str) -> Iterator[Image.Image]:
    """What a file says of its picture, none of which is decoded: it may be of any size but for STYLIZE_MAX_PIXELS.

    Raises what `load` raises.
    """
    most = limit("STYLIZE_MAX_PIXELS", sys.maxsize)
    with _told(path), _bounded(most), Image.open(path, formats=_READ) as picture:
        picture.info.setdefault("exif", b"")  # else Pillow decodes a PNG to look for it behind the pixels
        yield picture


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Raise what Pillow and we raise about the picture `name` as a ValueError that says so."""
    try:
        yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        pixels = limit("STYLIZE_MAX_PIXELS", MAX_PIXELS)
        raise ValueError(f"{name} has more than {pixels} pixels (STYLIZE_MAX_PIXELS)") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not a picture that Pillow can read") from error
    except MemoryError:
        raise
    except _RangeError as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
        raise ValueError(f"{name} is damaged ({error})") from error


def limit(variable: str, default: int) -> int:
    """A limit that the environment may set. Raises ValueError if it is no number."""
    text = os.environ.get(variable, str(default))
    if not (text.isdecimal() and int(text)):
        raise ValueError(f"{variable} {text!r}: give a whole number from 1")
    return int(text)


@contextlib.contextmanager
def _bounded(pixels: int) -> Iterator[None]:
    """Pillow refuses pictures of more pixels, embedded ones too; its other warnings are silent."""
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _from_array(array: NDArray[Any]) -> Picture:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or not array.size:
        raise ValueError(f"an array has to be (H, W), (H, W, 3) or (H, W, 4), not {array.shape}")
    kind = array.dtype.type  # in any order of bytes
    if kind not in (np.bool_, np.uint8, np.uint16) and not issubclass(kind, np.floating):
        raise TypeError(f"an array has to be bool, uint8, uint16 or float, not {array.dtype}")
    values = array.astype(np.float32)
    if issubclass(kind, np.unsignedinteger):
        values /= np.float32(np.iinfo(kind).max)
    elif not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError("a float array has to lie in [0, 1]")
    if array.ndim == 2:
        return Picture(np.repeat(values[..., None], 3, axis=2))
    if array.shape[2] == 3:
        return Picture(values)
    return Picture(np.ascontiguousarray(values[..., :3]), np.ascontiguousarray(values[..., 3]))


def _from_pil(image: Image.Image) -> Picture:
    tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits, negative = tags.get(_BITS, (16,))[0], tags.get(_PHOTOMETRIC) == 0
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        return _from_deep_grey(image, min(bits, 16), negative)
    alpha = None
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16-bit colour, which Pillow has brought to 8
        image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.has_transparency_data:
        image = image.convert("LA" if image.mode in ("L", "LA", "La") else "RGBA")
        alpha = _unit(image.getchannel("A"))
        image = image.convert(image.mode.removesuffix("A"))
    if image.mode not in ("RGB", "CMYK", "L", "LAB", "YCbCr"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    rgb = _to_srgb(image)
    return Picture(_unit(rgb), alpha)


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF tag says, or as it is if its EXIF data are damaged."""
    pixels = limit("STYLIZE_MAX_PIXELS", MAX_PIXELS)
    try:
        with _bounded(pixels):
            return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # they too make Pillow raise nearly anything
        log.warning("EXIF orientation left out of account: %s", error)
        return image


def _unit(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image, np.float32) / np.float32(255)


def _from_deep_grey(image: Image.Image, bits: int, negative: bool) -> Picture:
    """Grey with more than 8 bits: integers of so many, at most 16, or floats in [0, 1]; in a negative 0 is white."""
    grey = np.asarray(image, np.float32)
    key = image.info.get("transparency")
    alpha = (grey != key).astype(np.float32) if isinstance(key, int) else None
    if image.mode != "F":
        grey = grey / np.float32(2**bits - 1)
    if not (np.isfinite(grey).all() and grey.min() >= 0 and grey.max() <= 1):
        raise _RangeError(f"grey values outside of [0, {1 if image.mode == 'F' else 2**bits - 1}]")
    if negative:  # up to 8 bits Pillow does this
        grey = 1 - grey
    if "icc_profile" not in image.info:
        return Picture(np.repeat(grey[..., None], 3, axis=2), alpha)
    shades = Image.fromarray(np.arange(256, dtype=np.uint8)[None])  # what lies between them is interpolated
    shades.info["icc_profile"] = image.info["icc_profile"]
    curve = _unit(_to_srgb(shades))[0]
    colours = np.empty((*grey.shape, 3), np.float32)
    for channel in range(3):
        colours[..., channel] = np.interp(grey, np.linspace(0, 1, 256), curve[:, channel])
    return Picture(colours, alpha)


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile and profile != _srgb():
        try:
            own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError) as error:
            log.warning("ICC profile left out of account: %s", error)
    return image.convert("RGB")


def resize(picture: Picture, size: tuple[int, int], wrap: bool = False) -> Picture:
    """The picture at (width, height), by Lanczos in float; the same object if it has that size already.

    With `wrap` its borders see each other, so that a picture that tiles still does.
    """
    if picture.size == size:
        return picture
    channels = [resize_plane(picture.rgb[..., c], size, wrap) for c in range(3)]
    alpha = None if picture.alpha is None else resize_plane(picture.alpha, size, wrap)
    return Picture(np.stack(channels, axis=2), alpha)


def resize_plane(plane: NDArray[np.float32], size: tuple[int, int], wrap: bool) -> NDArray[np.float32]:
    """One channel (H, W), as `resize` does it."""
    height, width = plane.shape
    if size == (width, height):
        return plane
    box = (0, 0, width, height)
    if wrap:  # Pillow's filter also reads what lies around the box
        frame = [math.ceil(3 * max(1, have / want)) for have, want in zip((height, width), size[::-1], strict=True)]
        plane = np.pad(plane, [(length, length) for length in frame], mode="wrap")
        box = (frame[1], frame[0], frame[1] + width, frame[0] + height)
    resized = Image.fromarray(np.ascontiguousarray(plane)).resize(size, Image.Resampling.LANCZOS, box)
    return np.clip(np.asarray(resized, np.float32), 0, 1)


def to_tensor(picture: Picture) -> Tensor:
    """Pixels (1, 3, H, W), float32 in [0, 1], on the CPU."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(picture.rgb.transpose(2, 0, 1))[None])


def shown(picture: Picture) -> Picture:
    """The picture without alpha: what that hides has the mean colour of what it shows, which has to be something."""
    if picture.alpha is None or picture.opaque:
        return replace(picture, alpha=None)
    alpha = picture.alpha[..., None]
    rgb = picture.rgb * alpha
    mean = rgb.mean((0, 1), np.float64) / alpha.mean(dtype=np.float64)
    return replace(picture, rgb=rgb + (1 - alpha) * mean.astype(np.float32), alpha=None)


def from_tensor(pixels: Tensor) -> Picture:
    """The picture of pixels (1, 3, H, W); values outside [0, 1] are clamped."""
    return Picture(pixels[0].detach().clamp(0, 1).permute(1, 2, 0).float().cpu().numpy())


def to_pil(picture: Picture) -> Image.Image:
    """A PIL image of 8 bits a channel, RGB or RGBA."""
    image = Image.fromarray(_levels(picture.rgb, np.uint8))
    if picture.alpha is not None:
        image.putalpha(Image.fromarray(_levels(picture.alpha, np.uint8)))
    return image


def _levels(plane: NDArray[np.float32], kind: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    return np.rint(plane * np.float32(np.iinfo(kind).max)).astype(kind)


def output_format(path: str) -> str:
    """Pillow's format for the suffix of `path`, PNG for the pipe `-`. Raises ValueError for an unknown suffix."""
    if path == "-":
        return "PNG"
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS and Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give a file in it")
    if is_video(path):
        raise ValueError(f"{path}: only a video, or its frames, as CONTENT becomes a video")
    if suffix not in FORMATS:
        raise ValueError(f"{path}: unknown picture format {suffix!r}; choose from {', '.join(FORMATS)}")
    return FORMATS[suffix]


def check_output(path: str, overwrite: bool) -> None:
    """Raise ValueError or OSError now if `save` could not write the picture `path` later; leaves nothing behind."""
    if path == "-" and sys.stdout is None:
        raise ValueError("standard output is closed: no picture can be written to it")
    for each in written(path):
        check_writable(each, overwrite)
    if output_format(path) == _DEEP:
        import tifffile  # noqa: F401 (before the run, not behind it)


def check_size(path: str, size: tuple[int, int]) -> None:
    """Raise ValueError if the format of `path` cannot hold a picture of this (width, height)."""
    kind = output_format(path)
    most = _LONGEST.get(kind, max(size))
    if max(size) > most:
        raise ValueError(f"{path}: {kind} holds {most} pixels a side, not {size[0]} x {size[1]}: choose another format")


def written(path: str) -> list[str]:
    """The files that `save` may write for the picture `path`, its manifest among them; none for the pipe."""
    kind = output_format(path)
    if path == "-":
        return []
    return [path] if kind == "PNG" else [path, str(manifest.beside(path))]  # PNG alone holds any manifest


def check_writable(path: str, overwrite: bool) -> None:
    """Raise ValueError or OSError if no file can be written at `path`, or one is there; leaves nothing behind."""
    target = Path(path).resolve()
    if target.is_dir():
        raise ValueError(f"{path} is a folder")
    if not target.parent.is_dir():
        raise ValueError(f"{path}: {target.parent} is not a folder")
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is no ordinary file")
    if target.exists() and not overwrite:
        raise ValueError(f"{path} exists already; pass --overwrite to replace it")
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".stylize-"):
        pass


def save(image: Image.Image | Picture, path: str, record: Mapping[str, Any] | None = None) -> None:
    """Write the picture under a temporary name and rename it; `-` is standard output (PNG).

    It is written as `write` does it; where a format has no alpha, it is left out. `record`, its manifest, goes into the
    picture or, where the format cannot hold it, beside it.
    """
    kind = output_format(path)
    if isinstance(image, Picture) and kind != _DEEP:
        image = to_pil(image)
    if isinstance(image, Image.Image) and kind in _OPAQUE and image.mode == "RGBA":
        log.warning("%s holds no transparency: alpha left out", kind)
        image = image.convert("RGB")
    embedded = manifest.embed(kind, record)
    if path == "-":
        stream = io.BytesIO()
        write(image, stream, kind, **embedded)
        sys.stdout.buffer.write(stream.getvalue())
        sys.stdout.buffer.flush()
        return
    with atomic(Path(path)) as temporary:
        write(image, temporary, kind, **embedded)
    if record is not None and not embedded:
        with atomic(manifest.beside(path)) as temporary:
            temporary.write_text(json.dumps(record, indent=1))


def write(image: Image.Image | Picture, target: Path | BinaryIO, kind: str, **options: Any) -> None:
    """Write the picture to a file in one of the FORMATS, with `options` of Pillow's `save`.

    JPEG has quality 95 without chroma subsampling, WebP quality 95; TIFF holds a `Picture` in 16 bits a channel. What
    can hold it carries an sRGB profile, so that no screen or press has to guess the colours.
    """
    if isinstance(image, Picture):
        if kind == _DEEP:
            _write_deep(image, target)
            return
        image = to_pil(image)
    own: dict[str, Any] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}.get(kind, {})
    image.save(target, kind, **own | {"icc_profile": _srgb()} | options)


def _write_deep(picture: Picture, target: Path | BinaryIO) -> None:
    import tifffile

    planes = picture.rgb if picture.alpha is None else np.dstack((picture.rgb, picture.alpha))
    tifffile.imwrite(
        target,
        _levels(planes, np.uint16),
        photometric="rgb",
        extrasamples=() if picture.alpha is None else ("unassalpha",),
        compression="zlib",
        predictor=True,
        iccprofile=_srgb(),
        metadata=None,
        software=False,
    )


@functools.cache
def _srgb() -> bytes:
    """The ICC profile of sRGB, without the time it was made at: the same picture is the same bytes."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    return bytes(profile)


@contextlib.contextmanager
def atomic(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it on success, remove it otherwise.

    Whenever the power fails, the file of that name is the old or the new one. Where `target` is a link, the file that
    it leads to is written.
    """
    suffix, target = target.suffix, target.resolve()  # a link stays one
    temporary = target.with_name(f".stylize-{uuid.uuid4().hex}{suffix}")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
