"""The table of image formats in docs/data.md, row by row, each with a generated image.

Each row is a key of CASES, with the expected pixels or the refusal, and the findings of
`cspnet check`.
"""

import contextlib
import re
import struct
import warnings

import cv2
import numpy as np
import pytest
from PIL import features

from cspnet.data import stream
from cspnet.datasets import inspect_file
from cspnet.images import codecs, decode
from cspnet.images.formats import (
    TooLargeError,
    UnreadableError,
    apply_orientation,
    detect_format,
    to_8_bits,
)
from cspnet.images.ifd import IfdError, ImageFileDirectory
from cspnet.recipe.schema import Augment, Evaluate
from tests import images
from tests.conftest import ROOT, picture
from tests.format_cases import CASES, noise, orient
from tests.images import saved

TABLE = (ROOT / "docs" / "data.md").read_text().split("## Image formats")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\| `([\w-]+)` \|(.*)\|$", TABLE, re.M))


def difference(image, expected):
    assert image.shape == expected.shape and image.dtype == np.uint8
    return np.abs(image.astype(float) - expected)


def skip_without_a_codec(key):
    if key.startswith("avif") and not (features.check("avif") and cv2.haveImageWriter("x.avif")):
        pytest.skip("OpenCV or Pillow is built without AVIF")
    if key.startswith("gif") and not cv2.haveImageWriter("x.gif"):
        pytest.skip("OpenCV is built without GIF")


def test_format_table_lists_exactly_the_cases():
    assert list(ROWS) == list(CASES) and len(CASES) >= 40


@pytest.mark.parametrize("key", CASES)
def test_format_table_row(key):
    """Pixels, and the kinds that `cspnet check` reports: the last column of docs/data.md."""
    skip_without_a_codec(key)
    suffix, data, expected, *tolerance = CASES[key]()
    *_, what, reported = (cell.strip() for cell in ROWS[key].split("|"))
    with warnings.catch_warnings():  # Pillow warns about damaged EXIF
        warnings.simplefilter("ignore")
        kinds = {kind for kind, _ in inspect_file.inspect_bytes(data, f".{suffix}").findings}
    assert kinds == set(re.findall(r"`([^`]+)`", reported))
    assert what.startswith("refused") == isinstance(expected, type)
    if isinstance(expected, type):
        with pytest.raises(expected):
            decode.decode(data)
        return
    image = decode.decode(data)
    if tolerance:  # of the mean, for lossy formats and those with less than 8 bits of RGB
        assert difference(image, expected).mean() < tolerance[0]
    else:
        assert difference(image, expected).max() == 0
    assert image.flags.c_contiguous


@pytest.mark.parametrize("key", CASES)
def test_damaged_headers_raise_only_unreadable_error(key):
    """Headers are parsed before OpenCV decodes the file."""
    skip_without_a_codec(key)
    _, data, *_ = CASES[key]()
    rng = np.random.default_rng(1)
    for trial in range(60):
        damaged = bytearray(data)
        for _ in range(1 + trial % 4):
            damaged[rng.integers(min(len(data), 250))] = rng.integers(256)
        damaged = bytes(damaged[: rng.integers(len(data))] if trial % 3 == 0 else damaged)
        with contextlib.suppress(UnreadableError):
            codecs.read_info(damaged)
        if codecs.detect_format(damaged) == "PPM":
            with contextlib.suppress(UnreadableError):
                decode.decode(damaged)


@pytest.mark.parametrize(
    "header", [b"P4 3 3 ", b"P5 3 3 9 ", b"P3 3 3 9 ", b"P1 3 3 ", b"P6 3 3", b"P7\n"]
)
def test_netpbm_without_samples_is_unreadable(header):
    with pytest.raises(UnreadableError):
        decode.decode(header)


def test_avif_is_detected_by_any_of_its_brands():
    brands = b"mif1" + bytes(4) + b"mif1avif"
    assert detect_format(struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + b"rest") == "AVIF"
    assert (
        detect_format(b"\0\0\0\x14ftypheic" + bytes(4) + b"mif1avif") is None
    )  # after the end of the box


def test_pixel_limit_applies_to_every_format():
    """cspnet's own decoders check it before they allocate memory."""
    side = struct.pack("<i", 30_000)
    words = bytearray(CASES["bmp-16-565"]()[1])
    words[18:26] = side * 2
    for data in (bytes(words), b"P5 30000 30000 100\n", b"P2 30000 30000 100\n1 2"):
        with pytest.raises(TooLargeError):
            decode.decode(data)


def test_sample_scaling():
    """0 and the largest value become 0 and 255; values between are rounded to the nearest."""
    for top in (1, 15, 31, 100, 255, 1023, 4095, 65_535):
        values = np.arange(top + 1)
        expected = np.floor(255 * values / top + 0.5)
        assert (to_8_bits(values.astype(np.uint16), top) == expected).all()


def test_orientations_match_exif():
    image = noise(8).astype(np.uint8)
    for orientation in range(1, 9):
        assert (apply_orientation(image, orientation) == orient(image, orientation)).all(), (
            orientation
        )


def test_ifd_reads_integers_and_refuses_other_types():
    for order in "<>":
        for kind in (1, 3, 4):
            assert ImageFileDirectory(images.exif(6, kind, order)).orientation() == 6
    for block in (
        b"",
        b"II*\0",
        images.exif(9),
        images.exif(6)[:-8],
        images.exif(6, 3).replace(b"\3\0", b"\5\0", 1),
    ):
        with pytest.raises(IfdError):
            ImageFileDirectory(block).orientation()


@pytest.mark.parametrize("suffix, kind", [("png", "PNG"), ("webp", "WEBP"), ("jpg", "JPEG")])
def test_views_of_a_rotated_image_equal_those_of_the_upright_image(suffix, kind):
    """On all paths of training: full decode, rows below the view skipped, reduced decode."""
    image = picture(5, 180, 260)
    options = {"lossless": True} if kind == "WEBP" else {}
    prefix = b"Exif\0\0" if kind == "JPEG" else b""
    turned, straight = (saved(image, kind, exif=prefix + images.exif(o), **options) for o in (8, 1))
    assert turned != straight and codecs.read_info(turned).orientation == 8
    expected = np.rot90(decode.decode(straight)).copy()
    for reduced_decode in (False, True):
        for position in range(10):
            drawn = decode.sample_view(turned, stream.rng_for(0, 1, position), 64, Augment())
            view = decode.render_view(drawn, 64, Augment(), reduced_decode)
            whole = decode.train_view(expected, stream.rng_for(0, 1, position), 64, Augment())
            assert (view == whole).all()


def test_check_reports_images_that_evaluation_refuses_as_too_narrow():
    for height, width in ((1, 501), (1002, 2)):
        data = saved(np.zeros((height, width, 3), np.uint8), "PNG")
        assert [kind for kind, _ in inspect_file.inspect_bytes(data, ".png").findings] == ["ribbon"]
        for how in (Evaluate(), Evaluate(interpolation="antialias", crop_pct=0.875)):
            with pytest.raises(TooLargeError, match="too long and narrow"):
                decode.evaluation_view(decode.decode(data), 64, how)
    data = saved(np.zeros((1, 500, 3), np.uint8), "PNG")
    assert "ribbon" not in dict(inspect_file.inspect_bytes(data, ".png").findings)
    assert decode.evaluation_view(decode.decode(data), 64, Evaluate()).shape == (64, 64, 3)
