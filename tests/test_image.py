import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from engine import Config, Step, image


def png(array, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG", **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def a_million_pixels():
    """Headers that were damaged to promise more are refused, so that trying hundreds of them takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STYLIZE_MAX_PIXELS", "1000000")
        yield


def colour(height=6, width=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_path_bytes_pil_and_array_are_the_same_picture(tmp_path):
    array = colour()
    path = tmp_path / "a.png"
    path.write_bytes(png(array))
    sources = [path, str(path), png(array), Image.fromarray(array), array, array.astype(np.float64) / 255]
    for source in sources:
        np.testing.assert_allclose(image.load(source).rgb, array / 255, atol=1e-7)
        assert image.load(source).rgb.dtype == np.float32
        assert image.load(source).alpha is None


def test_exif_orientation_is_applied():
    array = colour(4, 9)
    picture = Image.fromarray(array)
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    stream = io.BytesIO()
    picture.save(stream, "PNG", exif=exif)
    np.testing.assert_allclose(image.load(stream.getvalue()).rgb, np.rot90(array, -1) / 255, atol=1e-7)


def test_grey_bilevel_palette_and_cmyk():
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    loaded = image.load(Image.fromarray(grey)).rgb
    np.testing.assert_allclose(loaded, np.repeat(grey[..., None], 3, 2) / 255, atol=1e-7)
    assert set(np.unique(image.load(Image.fromarray(grey).convert("1")).rgb)) <= {0, 1}
    flat = np.full((5, 5, 3), (200, 30, 90), np.uint8)
    for mode in ("P", "CMYK", "YCbCr", "LAB"):
        converted = Image.fromarray(flat)
        converted = converted.quantize(4) if mode == "P" else converted
        converted = converted.convert(mode) if mode in ("CMYK", "YCbCr") else converted
        np.testing.assert_allclose(image.load(converted).rgb, flat / 255, atol=0.02)


def test_sixteen_bit_grey_keeps_its_depth():
    deep = np.array([[0, 1000], [30000, 65535]], np.uint16)
    np.testing.assert_allclose(image.load(png(deep)).rgb[..., 0], deep / 65535, atol=1e-6)
    floats = np.array([[0, 0.25], [0.5, 1]], np.float32)
    np.testing.assert_allclose(image.load(Image.fromarray(floats)).rgb[..., 2], floats)
    stream = io.BytesIO()
    Image.fromarray(floats * 3).save(stream, "TIFF")
    for source in (Image.fromarray(floats * 3), stream.getvalue()):
        with pytest.raises(ValueError, match=r"grey values outside of \[0, 1\]$"):  # not: damaged
            image.load(source)


def test_sixteen_bit_grey_has_a_profile_and_a_transparent_value(caplog):
    """As the 8-bit picture of the same shades has."""
    shades = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
    grey = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # one of colour does not fit
    for profile in (grey, grey_profile(gamma=1.0)):
        flat, deep = (
            image.load(png(each, icc_profile=profile, transparency=int(each[2, 1])))
            for each in (shades, shades.astype(np.uint16) * 257)
        )
        np.testing.assert_allclose(deep.rgb, flat.rgb, atol=0.6 / 255)
        np.testing.assert_array_equal(deep.alpha, flat.alpha)
        assert deep.alpha.sum() == deep.alpha.size - 1
        assert (np.abs(deep.rgb[..., 0] - shades / 255).max() > 0.1) == (profile is not grey)
    assert caplog.text.count("ICC profile left out of account") == 2


def grey_profile(gamma):
    """An ICC profile of grey with this gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    table = struct.pack(">I", 2) + b"wtpt" + struct.pack(">II", 156, 20) + b"kTRC" + struct.pack(">II", 176, 16)
    head = struct.pack(">I4sI4s4s4s", 192, bytes(4), 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12) + b"acsp"
    return head + bytes(28) + struct.pack(">iii", 63190, 65536, 54061) + bytes(48) + table + white + curve


def test_twelve_bit_grey_is_not_darker():
    values, end = [0, 4095, 2048, 1, 4094, 7, 300, 4000], 8 + 2 + 12 * 9 + 4
    pairs = zip(values[::2], values[1::2], strict=True)
    data = b"".join(bytes([one >> 4, (one & 15) << 4 | two >> 8, two & 255]) for one, two in pairs)
    tags = [(256, 3, 1, 4), (257, 3, 1, 2), (258, 3, 1, 12), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, end)]
    tags += [(277, 3, 1, 1), (278, 3, 1, 2), (279, 4, 1, len(data))]
    table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    found = image.load(struct.pack("<2sHIH", b"II", 42, 8, 9) + table + bytes(4) + data)
    np.testing.assert_allclose(found.rgb[..., 0].ravel(), np.array(values) / 4095, atol=1e-6)


@pytest.mark.parametrize(("kind", "most"), [(np.uint16, 65535), (np.float32, 1)])
def test_a_negative_is_turned_into_a_positive(kind, most):
    """A TIFF whose zero is white: Pillow does it up to 8 bits."""
    values, stream = np.linspace(0, most, 48).astype(kind).reshape(6, 8), io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF", tiffinfo={262: 0})
    written = image.load(stream.getvalue()).rgb[..., 1]
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    np.testing.assert_allclose(written, 1 - image.load(stream.getvalue()).rgb[..., 1], atol=1e-6)


def test_pictures_of_pillow_that_are_empty_or_damaged():
    with pytest.raises(ValueError, match="has to have pixels, not 0 x 5"):
        image.load(Image.new("RGB", (0, 5)))
    cut = png(colour(60, 80))[:2000]
    with pytest.raises(ValueError, match="picture is damaged"):
        image.load(Image.open(io.BytesIO(cut)))


def test_closed_streams_are_told(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        image.load("-")
    with pytest.raises(ValueError, match="standard output is closed"):
        image.check_output("-", overwrite=False)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_is_set_apart(mode):
    array = np.dstack([colour(), np.arange(48, dtype=np.uint8).reshape(6, 8) * 5])
    source = Image.fromarray(array)
    if mode == "P":
        source = Image.fromarray(colour()).quantize(8)
        source.info["transparency"] = 0
        alpha = np.where(np.asarray(source) == 0, 0, 1)
    else:
        source = source.convert(mode)
        alpha = array[..., 3] / 255
    loaded = image.load(source)
    assert loaded.rgb.shape == (6, 8, 3)
    np.testing.assert_allclose(loaded.alpha, alpha, atol=1e-6)


def test_icc_profile_is_brought_to_srgb(caplog):
    """A profile with sRGB's colours but gamma 1.0 instead of 2.4: its middle grey is a light grey in sRGB."""
    array = np.full((3, 3, 3), 128, np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_allclose(image.load(png(array, icc_profile=srgb)).rgb, array / 255, atol=0.005)
    gamma = struct.pack(">i", round(2.4 * 65536))
    assert gamma in srgb
    steep = srgb.replace(gamma, struct.pack(">i", 65536))
    assert image.load(png(array, icc_profile=steep)).rgb.mean() > 0.6
    for mode in ("RGBA", "P"):  # so it is beside alpha and in a palette
        stream = io.BytesIO()
        source = Image.fromarray(colour()).quantize(8) if mode == "P" else Image.fromarray(colour()).convert(mode)
        source.save(stream, "PNG", icc_profile=steep)
        expected = image.load(png(np.asarray(source.convert("RGB")), icc_profile=steep)).rgb
        assert np.abs(expected - np.asarray(source.convert("RGB")) / 255).max() > 0.1
        np.testing.assert_array_equal(image.load(stream.getvalue()).rgb, expected)
    assert not caplog.text
    np.testing.assert_allclose(image.load(png(array, icc_profile=b"broken")).rgb, array / 255, atol=1e-6)
    assert "ICC profile" in caplog.text


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb():
    """A PNG of 50000 x 50000 pixels in a few bytes."""
    head = struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"not a picture at all", "not a picture"),
        (png(colour(64, 64))[:200], "damaged|not a picture"),
        (bomb(), "more than"),
    ],
)
def test_bad_files(tmp_path, content, words):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ValueError, match=words):
            image.load(source)


def test_limits_can_be_changed_either_way(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(png(colour(6, 8)))
    monkeypatch.setenv("STYLIZE_MAX_PIXELS", "40")  # Pillow itself only warns up to twice this
    for source in (path, path.read_bytes()):
        with pytest.raises(ValueError, match="more than 40 pixels"):
            image.load(source)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setenv("STYLIZE_MAX_PIXELS", "48")
    assert image.load(path).size == (8, 6)
    assert Image.MAX_IMAGE_PIXELS == 10  # the host's own limit is as it was
    monkeypatch.setenv("STYLIZE_MAX_BYTES", "100")
    for source in (path, path.read_bytes(), "/dev/zero"):
        with pytest.raises(ValueError, match="more than 100 bytes"):
            image.load(source)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    with pytest.raises(ValueError, match="standard input has more than 100 bytes"):
        image.load("-")
    for bad in ("0", "-1", "many", ""):
        monkeypatch.setenv("STYLIZE_MAX_BYTES", bad)
        with pytest.raises(ValueError, match="STYLIZE_MAX_BYTES"):
            image.load(path)
    monkeypatch.delenv("STYLIZE_MAX_BYTES")
    monkeypatch.setenv("STYLIZE_MAX_PIXELS", "many")
    with pytest.raises(ValueError, match="STYLIZE_MAX_PIXELS 'many'"):
        image.load(Image.fromarray(colour()))


def headers():
    """A file of each format that promises some 1e9 pixels and holds none."""
    yield bomb()
    yield b"P6 50000 50000 255\n"
    yield b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    yield b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 50000, 50000, 1, 24, *[0] * 6)
    yield b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 65500, 65500, 3) + bytes([1, 17, 0, 2, 17, 0, 3, 17, 0])
    tags = [(256, 3, 1, 60000), (257, 3, 1, 60000), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 9)]
    rows = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    yield struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + rows + bytes(4)
    size = struct.pack("<I", 16382)[:3] * 2
    yield b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + size


def test_promised_pixels_cost_no_memory():
    """With 200 MB more than an interpreter that has loaded Pillow: nothing is decoded before the size is checked."""
    code = (
        "import resource, sys\nfrom engine import image\n"
        "image.load(bytes.fromhex(sys.argv[1]))\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 200 * 2**20,) * 2)\n"
        "for data in sys.argv[2:]:\n"
        "    try: image.load(bytes.fromhex(data))\n"
        "    except ValueError as error: print(error)\n"
    )
    files = [data.hex() for data in (png(colour()), *headers())]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 7
    assert sum("more than" in message for message in messages) >= 5, messages


@pytest.mark.parametrize("kind", ["EPS", "PDF", "PSD", "FLI", "WMF"])
def test_formats_that_run_other_programs_are_not_pictures(kind):
    stream = io.BytesIO()
    if kind in ("EPS", "PDF"):
        Image.fromarray(colour()).save(stream, kind)
    else:
        magic = {"PSD": b"8BPS\0\1", "FLI": b"\0\0\0\0\x11\xaf", "WMF": b"\xd7\xcd\xc6\x9a\0\0"}
        stream.write(magic[kind] + bytes(99))
    with pytest.raises(ValueError, match="not a picture"):
        image.load(stream.getvalue())


def test_sixteen_bit_colour_keeps_its_upper_bits():
    """Pillow's limit: of 16 bits in a colour PNG or TIFF the upper 8 are read."""
    deep = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in deep))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    np.testing.assert_allclose(image.load(content).rgb, (deep >> 8) / 255, atol=1e-6)
    key = chunk(b"tRNS", deep[1, 2].tobytes())
    content = content.replace(head, head + key)
    assert np.argwhere(image.load(content).alpha == 0).tolist() == [[1, 2]]
    data, end = deep.astype("<u2").tobytes(), 8 + 2 + 12 * 10 + 4
    tags = [(256, 3, 1, 7), (257, 3, 1, 5), (258, 3, 3, end), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, end + 6)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 5), (279, 4, 1, len(data)), (284, 3, 1, 1)]
    table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    content = struct.pack("<2sHIH", b"II", 42, 8, 10) + table + bytes(4) + struct.pack("<HHH", 16, 16, 16) + data
    np.testing.assert_allclose(image.load(content).rgb, (deep >> 8) / 255, atol=1e-6)


@pytest.mark.parametrize("kind", [bool, np.uint8, np.uint16, ">u2", np.float16, np.float64])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays(kind, channels):
    values = np.random.default_rng(0).integers(0, 2, (5, 7, channels)) / (1 if kind is bool else 3)
    most = np.iinfo(np.dtype(kind).type).max if np.issubdtype(kind, np.integer) else 1
    array = (values * most).astype(kind)
    found = image.load(array[..., 0] if channels == 1 else array)
    np.testing.assert_allclose(found.rgb, np.broadcast_to(values[..., :3], (5, 7, 3)), atol=2e-4)
    assert found.rgb.dtype == np.float32
    assert found.rgb.flags.c_contiguous
    assert (found.alpha is None) == (channels < 4)
    if channels == 4:
        np.testing.assert_allclose(found.alpha, values[..., 3], atol=2e-4)


def test_missing_files_and_other_types(tmp_path):
    with pytest.raises(FileNotFoundError):
        image.load(tmp_path / "missing.png")
    with pytest.raises(ValueError, match=r"https://example.com/a.jpg: no address is fetched"):
        image.load("https://example.com/a.jpg")
    with pytest.raises(TypeError, match="not int"):
        image.load(7)
    for shape in ((4,), (4, 4, 1), (4, 4, 5), (0, 4), (2, 4, 4, 3)):
        with pytest.raises(ValueError, match=r"\(H, W\), \(H, W, 3\) or \(H, W, 4\), not "):
            image.load(np.zeros(shape))
    with pytest.raises(TypeError, match="uint16 or float, not int32"):
        image.load(np.zeros((4, 4, 3), np.int32))
    for bad in (1.5, np.nan):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            image.load(np.full((4, 4, 3), bad))


@pytest.mark.parametrize(
    ("kind", "options", "apart"),
    [("PPM", {}, 0), ("JPEG2000", {"irreversible": False}, 0), ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 6)],
)
def test_formats_without_a_suffix_to_write(kind, options, apart):
    smooth = np.tile(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 1, 3))
    stream = io.BytesIO()
    Image.fromarray(smooth).save(stream, kind, **options)
    np.testing.assert_allclose(image.load(stream.getvalue()).rgb, smooth / 255, atol=(apart + 0.01) / 255)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_moving_pictures_the_first_frame_counts(kind):
    red, blue = (Image.new("RGB", (20, 20), name) for name in ("red", "blue"))
    stream = io.BytesIO()
    red.save(stream, kind, save_all=True, append_images=[blue, blue])
    found = image.load(stream.getvalue()).rgb
    assert found[..., 0].min() > 0.97
    assert found[..., 2].max() < 0.03


def test_a_wrong_limit_is_no_damage_of_a_picture(monkeypatch):
    monkeypatch.setenv("STYLIZE_MAX_PIXELS", "many")
    for source in (Image.new("RGB", (9, 9)), png(colour())):
        with pytest.raises(ValueError, match=r"^STYLIZE_MAX_PIXELS 'many'"):
            image.load(source)


def loads_or_is_refused(content):
    try:
        picture = image.load(content)
    except ValueError:
        return
    assert np.isfinite(picture.rgb).all()
    assert picture.rgb.min() >= 0
    assert picture.rgb.max() <= 1


KINDS = ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"]


def file(kind, **options):
    stream = io.BytesIO()
    Image.fromarray(colour(16, 16)).save(stream, kind, **options)
    return stream.getvalue()


FILES = {kind: file(kind) for kind in KINDS}
FILES |= {"TIFF-LZW": file("TIFF", compression="tiff_lzw"), "progressive": file("JPEG", progressive=True)}


@settings(max_examples=200)
@given(data=st.data())
def test_damaged_pictures_load_or_are_refused(a_million_pixels, data):
    """Whatever is done to a valid file: bytes changed (most of all in the header), cut out, doubled, cut off."""
    content = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    for _ in range(data.draw(st.integers(0, 8))):
        place = data.draw(st.integers(0, min(64, len(content) - 1)) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    content = data.draw(
        st.sampled_from([content, content[:stop], content[:start] + content[stop:], content[:stop] + content[start:]])
    )
    loads_or_is_refused(bytes(content))


@settings(max_examples=40)
@given(st.sampled_from(sorted(FILES)), st.sampled_from(sorted(FILES)), st.binary(max_size=40))
def test_two_files_in_one_load_or_are_refused(a_million_pixels, one, other, between):
    loads_or_is_refused(FILES[one] + between + FILES[other])
    loads_or_is_refused(FILES[one][:12] + FILES[other])
    loads_or_is_refused(between + FILES[one])


@settings(max_examples=60)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF"]), st.binary(max_size=60), st.binary(max_size=60))
def test_garbage_for_exif_and_profile_leaves_the_picture(kind, exif, profile):
    good = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"icc_profile": good[: 8 * len(profile)] + profile}
    if kind != "TIFF":
        options["exif"] = b"Exif\0\0" + exif
    picture = image.load(file(kind, **options))
    assert picture.size == (16, 16)
    if kind == "PNG":
        np.testing.assert_allclose(picture.rgb, colour(16, 16) / 255, atol=0.01)


@given(st.integers(0, 2**16 - 1))
def test_any_orientation_leaves_a_picture(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert set(image.load(file("PNG", exif=exif)).size) == {16}


def test_fit_keeps_the_aspect():
    picture = image.Picture(np.zeros((300, 451, 3), np.float32))
    assert picture.fit(512) == (512, 341)
    assert image.Picture(np.zeros((451, 300, 3), np.float32)).fit(512) == (341, 512)


def test_resize_leaves_alone_what_fits_and_stays_in_range():
    picture = image.Picture(colour(20, 30).astype(np.float32) / 255, np.ones((20, 30), np.float32))
    assert image.resize(picture, (30, 20)) is picture
    larger = image.resize(picture, (47, 31))
    assert larger.rgb.shape == (31, 47, 3)
    assert larger.alpha.shape == (31, 47)
    assert larger.rgb.min() >= 0
    assert larger.rgb.max() <= 1
    flat = image.Picture(np.full((20, 30, 3), 0.3, np.float32))
    np.testing.assert_allclose(image.resize(flat, (13, 9)).rgb, 0.3, atol=1e-6)


def test_tensor_and_back():
    array = colour()
    pixels = image.to_tensor(image.load(array))
    assert pixels.shape == (1, 3, 6, 8)
    picture = image.from_tensor(pixels)
    np.testing.assert_array_equal(np.asarray(image.to_pil(picture)), array)
    outside = torch.tensor([-0.5, 0.5, 1.7]).reshape(1, 3, 1, 1)
    np.testing.assert_array_equal(np.asarray(image.to_pil(image.from_tensor(outside))), [[[0, 128, 255]]])
    alpha = np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8)
    back = np.asarray(image.to_pil(replace(picture, alpha=alpha)))
    np.testing.assert_allclose(back[..., 3] / 255, alpha, atol=0.5 / 255)


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp"])
def test_save_by_suffix(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    smooth = np.tile(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None], (32, 1, 3))
    image.save(Image.fromarray(smooth), str(path))
    np.testing.assert_allclose(np.asarray(Image.open(path).convert("RGB")).astype(int), smooth, atol=6)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("with_alpha", [False, True])
def test_a_tiff_has_16_bits_a_channel(tmp_path, with_alpha):
    rng = np.random.default_rng(0)
    rgb = rng.random((37, 53, 3)).astype(np.float32)
    rgb[0, :2] = [[0, 1, 0.5], [1 / 65535, 1 / 255, 0.25]]
    alpha = rng.random((37, 53)).astype(np.float32) if with_alpha else None
    for name in ("one.tif", "two.tif"):
        image.save(image.Picture(rgb, alpha), str(tmp_path / name))
    assert (tmp_path / "one.tif").read_bytes() == (tmp_path / "two.tif").read_bytes()
    found = tifffile.imread(tmp_path / "one.tif")
    planes = rgb if alpha is None else np.dstack((rgb, alpha))
    assert found.dtype == np.uint16
    np.testing.assert_allclose(found / 65535, planes.astype(np.float64), atol=0.501 / 65535)
    back = image.load(tmp_path / "one.tif")  # another reader, which keeps 8 bits of colour
    np.testing.assert_allclose(back.rgb, rgb, atol=1.01 / 255)
    assert (back.alpha is None) == (alpha is None)
    if alpha is not None:
        np.testing.assert_allclose(back.alpha, alpha, atol=1.01 / 255)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_pictures_carry_the_profile_of_srgb(tmp_path, suffix):
    path = tmp_path / f"out.{suffix}"
    image.save(image.load(colour()), str(path))
    with Image.open(path) as picture:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(picture.info["icc_profile"]))
        assert profile.profile.profile_description.startswith("sRGB")
        chromaticities = np.array(profile.profile.chromaticity)[:, :2]
        primaries = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]  # IEC 61966-2-1
        np.testing.assert_allclose(chromaticities, primaries, atol=2e-3)
        picture.load()
        if suffix == "png":  # no conversion takes place when it is read
            np.testing.assert_array_equal(image.load(path).rgb, np.asarray(picture, np.float32) / np.float32(255))


def test_jpeg_is_95_without_chroma_subsampling(tmp_path):
    from PIL import JpegImagePlugin

    image.save(Image.fromarray(colour(32, 32)), str(tmp_path / "out.jpg"))
    with Image.open(tmp_path / "out.jpg") as written:
        assert JpegImagePlugin.get_sampling(written) == 0  # 4:4:4
        reference = io.BytesIO()
        Image.fromarray(colour(32, 32)).save(reference, "JPEG", quality=95)
        with Image.open(reference) as expected:
            assert written.quantization == expected.quantization


def test_alpha_survives_png_and_is_left_out_of_jpeg(tmp_path, caplog):
    rgba = Image.fromarray(np.dstack([colour(), np.full((6, 8), 77, np.uint8)]))
    image.save(rgba, str(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as written:
        assert written.getchannel("A").getextrema() == (77, 77)
    image.save(rgba, str(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "a.jpg") as written:
        assert written.mode == "RGB"
    assert "alpha left out" in caplog.text


def test_a_digest_is_of_the_size_and_the_values():
    picture = image.load(colour())
    values = hashlib.sha256(repr((picture.size, True)).encode() + picture.rgb.tobytes()).hexdigest()
    assert picture.digest == image.load(colour()).digest == values
    clear = image.Picture(picture.rgb, np.ones(picture.rgb.shape[:2], np.float32))
    others = [image.load(colour(seed=1)), image.load(colour(8, 6)), clear]
    assert len({values, *(each.digest for each in others)}) == 4


def test_output_is_checked_before_the_work(tmp_path):
    good = tmp_path / "out.png"
    image.check_output(str(good), overwrite=False)
    image.check_output("-", overwrite=False)
    assert not list(tmp_path.iterdir())
    good.touch()
    with pytest.raises(ValueError, match="--overwrite"):
        image.check_output(str(good), overwrite=False)
    image.check_output(str(good), overwrite=True)
    with pytest.raises(ValueError, match=r"unknown picture format '.xyz'"):
        image.check_output(str(tmp_path / "out.xyz"), overwrite=False)
    with pytest.raises(ValueError, match="not a folder"):
        image.check_output(str(tmp_path / "missing" / "out.png"), overwrite=False)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        image.check_output(str(tmp_path / "folder.png"), overwrite=True)


def test_a_format_that_cannot_hold_the_size_is_told(tmp_path):
    for name, size in {"a.webp": (16383, 9), "a.jpg": (9, 65500), "a.png": (10**6, 9), "-": (10**6, 9)}.items():
        image.check_size(name, size)
    for name, size in {"a.webp": (9, 16384), "a.jpg": (65501, 9)}.items():
        with pytest.raises(ValueError, match=r"holds \d+ pixels a side, not \d+ x \d+: choose another format"):
            image.check_size(name, size)
        with pytest.raises((OSError, ValueError)):  # Pillow itself cannot
            image.save(Image.new("L", size), str(tmp_path / name))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "out.png"
    target.write_text("old")
    with pytest.raises(RuntimeError), image.atomic(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "scratch" / "file")
    for text in ("new", "newer"):
        with image.atomic(tmp_path / "run") as temporary:
            temporary.write_text(text)
        assert (tmp_path / "run").is_symlink()
        assert (tmp_path / "scratch" / "file").read_text() == text
    assert [path.name for path in (tmp_path / "scratch").iterdir()] == ["file"]
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere" / "file.png")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        image.check_output(str(tmp_path / "lost.png"), overwrite=True)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, sync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("on the disk"), sync(file)))
    monkeypatch.setattr(Path, "replace", lambda self, target: (order.append(Path(target).name), replace(self, target)))
    image.save(Image.fromarray(colour()), str(tmp_path / "out.png"))
    assert order == ["on the disk", "out.png"]


def test_written_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        image.save(Image.fromarray(colour()), str(tmp_path / "out.png"))
    finally:
        os.umask(before)
    assert Path(tmp_path / "out.png").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("tile", [False, True])
def test_the_alpha_of_a_step_is_resized_as_its_picture_is(tile):
    random = np.random.default_rng(0).random
    content = image.Picture(random((48, 32, 3), np.float32), random((48, 32), np.float32))
    iterate = SimpleNamespace(best=torch.zeros(1, 3, 96, 64))
    found = Step(96, 1, 1, "fp32", iterate, content, Config(tile=tile), None, None, None).image.getchannel("A")
    truth = image.resize(content, (64, 96), wrap=tile).alpha
    np.testing.assert_allclose(np.asarray(found) / 255, truth, atol=0.51 / 255)


@pytest.mark.parametrize("size", [(32, 48), (40, 24), (16, 96)])
def test_a_picture_that_wraps_is_resized_without_borders(size):
    """As the middle of three by three of it."""
    rgb = np.random.default_rng(0).random((48, 32, 3)).astype(np.float32)
    found = image.resize(image.load(rgb), size, wrap=True).rgb
    width, height = size
    truth = image.resize(image.load(np.tile(rgb, (3, 3, 1))), (3 * width, 3 * height)).rgb
    np.testing.assert_allclose(found, truth[height : 2 * height, width : 2 * width], atol=1e-5)
    if size != (32, 48):
        assert np.abs(found - image.resize(image.load(rgb), size).rgb).max() > 0.02
