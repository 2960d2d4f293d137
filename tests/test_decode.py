import io
import math
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from cspnet.data import stream
from cspnet.images import decode
from cspnet.images import jpeg as jpeg_module
from cspnet.recipe.schema import Augment, Evaluate
from tests.bombs import BOMBS
from tests.conftest import ROOT, picture


class Scripted:
    """A random generator with given numbers: each call returns the next of a list."""

    def __init__(self, *values):
        self.values = list(values)

    def uniform(self, low, high):
        return self.values.pop(0)

    def random(self):
        return self.values.pop(0)

    def integers(self, low, high):
        return self.values.pop(0)


def slow_view(image, size, aspect, target, angle, dx, dy, flip):
    """The view pixel by pixel, in float64: load_image_augment_paths, rotate_crop_image."""
    height, width = image.shape[:2]
    m = height if height < width * aspect else int(width * aspect)
    s = target / m
    theta = math.radians(angle)

    def pixel(x, y):
        if 0 <= x < width and 0 <= y < height:
            return image[y, x].astype(np.float64)
        return np.zeros(3)

    view = np.zeros((size, size, 3))
    for y in range(size):
        for x in range(size):
            p = (x - size / 2 + dx) * aspect / s
            q = (y - size / 2 + dy) / s
            u = math.cos(theta) * p - math.sin(theta) * q + width / 2
            v = math.sin(theta) * p + math.cos(theta) * q + height / 2
            x0, y0 = math.floor(u), math.floor(v)
            fx, fy = u - x0, v - y0
            view[y, x] = (
                (1 - fy) * (1 - fx) * pixel(x0, y0)
                + (1 - fy) * fx * pixel(x0 + 1, y0)
                + fy * (1 - fx) * pixel(x0, y0 + 1)
                + fy * fx * pixel(x0 + 1, y0 + 1)
            )
    return view[:, ::-1] if flip else view


@pytest.mark.parametrize(
    "shape, aspect, target, angle, flip",
    [
        ((60, 80), 0.8, 40, 5.0, False),
        ((60, 80), 1.25, 32, -7.0, True),
        ((80, 60), 0.9, 100, 3.0, True),
        ((80, 60), 1 / 0.75, 30, 0.0, False),
        ((50, 50), 1.0, 48, 7.0, False),
    ],
)
def test_view_matches_the_reference(shape, aspect, target, angle, flip):
    size, (height, width) = 48, shape
    image = picture(1, height, width)
    m = height if height < width * aspect else int(width * aspect)
    s = target / m
    dx = 0.6 * max(0, (width * s / aspect - size) / 2)
    dy = -0.3 * max(0, (height * s - size) / 2)
    inverted = aspect > 1
    rng = Scripted(
        1 / aspect if inverted else aspect,
        0.9 if inverted else 0.1,
        target,
        angle,
        dx,
        dy,
        0.1 if flip else 0.9,
    )
    view = decode.train_view(image, rng, size, Augment())
    assert not rng.values, "all numbers are used"
    expected = slow_view(image, size, aspect, target, angle, dx, dy, flip)
    difference = np.abs(view - expected)
    assert difference.mean() <= 1
    assert np.quantile(difference, 0.99) <= 3


def test_random_parameters_cover_their_ranges():
    """Derived from the matrix of a square image: aspect × scale, rotation, flip."""
    augment = Augment()
    size = 256
    flips, angles, scales, targets = 0, [], [], []
    for position in range(4000):
        rng = stream.rng_for(0, stream.VIEW_DOMAIN, position)
        matrix = decode.train_matrix(rng, 300, 300, size, augment)
        (a, b), (c, d) = matrix[:, :2]
        flips += np.linalg.det(matrix[:, :2]) < 0
        angles.append(math.degrees(math.atan2(-b, d)))
        vertical = math.hypot(b, d)  # image pixels per view pixel: 1 / s
        scales.append(math.hypot(a, c) / vertical)
        m = 300 if scales[-1] > 1 else int(300 * scales[-1] + 1e-9)
        targets.append(m / vertical)
    assert 0.47 < flips / 4000 < 0.53
    assert -7 <= min(angles) < -6.9 and 6.9 < max(angles) <= 7
    assert 0.75 <= min(scales) < 0.76 and 1.32 < max(scales) <= 1 / 0.75 + 1e-9
    assert 0.47 < np.mean(np.array(scales) < 1) < 0.53
    assert 128 <= round(min(targets)) <= 130 and 446 <= round(max(targets)) <= 448
    assert abs(np.mean(targets) - 288) < 5


def test_fraction_of_views_with_a_black_border():
    """40 ± 2 % of the crops of a 500×375 image, without rotation."""
    bordered = 0
    for position in range(20_000):
        rng = stream.rng_for(7, stream.VIEW_DOMAIN, position)
        matrix = decode.train_matrix(rng, 500, 375, 256, Augment(rotation=0))
        corners = np.array([[0, 0, 1], [255, 0, 1], [0, 255, 1], [255, 255, 1]]) @ matrix.T
        inside = (corners >= -1) & (corners <= np.array([500, 375]))
        bordered += not inside.all()
    assert abs(bordered / 20_000 - 0.40) <= 0.02


def jpeg(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **{"quality": 95} | options)
    return file.getvalue()


def jpeg_size(data):
    header = jpeg_module.read_header(data)
    return header and header[:2]


def scaled(data, rng, size, augment, out=None):
    return decode.render_view(
        decode.sample_view(data, rng, size, augment), size, augment, True, out
    )


def turned(orientation):
    exif = Image.Exif()
    exif[jpeg_module.ORIENTATION] = orientation
    return exif


def test_jpeg_size_is_read_from_the_header():
    image = picture(9, 51, 77)
    described = Image.Exif()
    described[0x010E] = "a picture that nobody turned"
    upright = [{}, {"progressive": True}, {"exif": described}, {"exif": turned(1)}, {"xmp": b"<x>"}]
    for options in upright:
        assert jpeg_size(jpeg(image, **options)) == (77, 51), options
    assert jpeg_size(jpeg(image[:, :, 0])) == (77, 51)
    for orientation in (0, 2, 3, 6, 8, 77):
        assert jpeg_size(jpeg(image, exif=turned(orientation))) is None
    broken = jpeg(image, exif=described).replace(b"\x01\x0e\x00\x02", b"\x01\x0e\x00\xff")
    assert jpeg_size(broken) in (None, (77, 51))
    assert jpeg_size(cv2.imencode(".png", image)[1].tobytes()) is None


def test_size_of_a_damaged_jpeg_is_none_or_a_pair():
    whole = jpeg(picture(10, 51, 77), exif=turned(1))
    frame = whole.index(b"\xff\xc0")
    for end in range(frame + 9):
        assert jpeg_size(whole[:end]) is None
    rng = np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(whole[: frame + 20])
        damaged[rng.integers(len(damaged))] = rng.integers(256)
        size = jpeg_size(bytes(damaged))
        assert size is None or min(size) > 0


@pytest.mark.parametrize("shape", [(300, 400), (301, 401), (403, 299)])
@pytest.mark.parametrize("resize, factor", [((0.9, 1.0), 2), ((0.5, 0.6), 4)])
def test_reduced_decode_preserves_geometry(monkeypatch, shape, resize, factor):
    """A bright spot is where the matrix maps it, to a tenth of a pixel."""
    size, augment = 128, Augment(scale=resize, aspect=1.0)
    if factor == 4:
        size = 120  # 300 / (0.6 * 120) is above 4
    decoded = []
    original = decode.decode
    monkeypatch.setattr(
        decode, "decode", lambda data, reduce=1: (decoded.append(reduce), original(data, reduce))[1]
    )
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    yy, xx = np.mgrid[:size, :size]
    for seed in range(8):
        x, y = (np.random.default_rng(seed).uniform(0.3, 0.7, 2) * shape[::-1]).tolist()
        spot = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 12**2))
        image = np.repeat(spot.astype(np.uint8)[:, :, None], 3, 2)
        matrix = decode.train_matrix(stream.rng_for(0, 1, seed), *shape[::-1], size, augment)
        expected = np.linalg.solve(matrix[:, :2], np.array([x, y]) - matrix[:, 2])
        data = jpeg(image, quality=100)
        view = scaled(data, stream.rng_for(0, 1, seed), size, augment)
        weights = view[:, :, 0] / view[:, :, 0].sum()
        centre = np.array([(weights * xx).sum(), (weights * yy).sum()])
        assert np.abs(centre - expected).max() < 0.1
    assert decoded == [factor] * 8


def test_reduced_views_differ_slightly_and_only_below_half_size():
    augment, size, reduced = Augment(), 64, 0
    for position in range(60):
        image = picture(position, 201, 267)
        data = jpeg(image)
        matrix = decode.train_matrix(stream.rng_for(0, 1, position), 267, 201, size, augment)
        shrinks = min(np.linalg.svd(matrix[:, :2], compute_uv=False))
        view = scaled(data, stream.rng_for(0, 1, position), size, augment)
        whole = decode.decode(data)
        plain = decode.train_view(whole, stream.rng_for(0, 1, position), size, augment)
        if shrinks < 2:
            assert (view == plain).all()
        else:
            reduced += 1
            # Except at the border, where bilinear sampling blends with black from outside.
            inside = cv2.erode(plain.any(2).astype(np.uint8), np.ones((5, 5)), borderValue=0) > 0
            assert np.abs(view.astype(int) - plain)[inside].mean() < 1
    assert 20 < reduced < 60


@pytest.mark.parametrize("orientation", [1, 6])
def test_header_size_that_differs_from_the_decoded_size(monkeypatch, orientation):
    """Then, and if EXIF rotates the image, all rows are decoded, with the same random numbers."""
    data, augment = jpeg(picture(11, 300, 401), exif=turned(orientation)), Augment()
    plain = decode.train_view(decode.decode(data), stream.rng_for(0, 1, 2), 64, augment)
    if orientation == 1:
        header = jpeg_module.JpegHeader(300, 401, 0, 8, 0)
        monkeypatch.setattr(jpeg_module, "read_header", lambda data: header)
    view = scaled(data, stream.rng_for(0, 1, 2), 64, augment)
    assert (view == plain).all()


SAMPLINGS = ["4:4:4", "4:2:2", "4:2:0"]


@pytest.mark.parametrize(
    "options",
    [{"subsampling": each} for each in SAMPLINGS]
    + [
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"exif": turned(6)},
        {"grey": True},
    ],
)
def test_skipping_rows_below_the_view_changes_nothing(capfd, monkeypatch, options):
    """Views of encoded bytes equal those of the whole image, although fewer rows are decoded."""
    rows, original = [], decode.decode
    monkeypatch.setattr(
        decode,
        "decode",
        lambda *given: (rows.append((image := original(*given)).shape[0]), image)[1],
    )
    options = dict(options)
    grey = options.pop("grey", False)
    saved = 0
    for position in range(150):
        rng = np.random.default_rng(position)
        height, width = rng.integers(60, 300, 2)
        # Noise, in which a difference of chroma interpolation would show.
        image = picture(position, height, width) // 2 + rng.integers(
            0, 128, (height, width, 3), np.uint8
        )
        data = jpeg(image[:, :, 0] if grey else image, **options)
        plain = decode.train_view(original(data), stream.rng_for(0, 1, position), 96, Augment())
        drawn = decode.sample_view(data, stream.rng_for(0, 1, position), 96, Augment())
        rows.clear()
        assert (decode.render_view(drawn, 96, Augment()) == plain).all(), position
        assert len(rows) == 1, "decoded once"
        saved += rows[0] < original(data).shape[0]
    if {"progressive", "restart_marker_rows", "exif"} & options.keys():
        assert saved == 0
    else:
        assert saved > 30
    assert capfd.readouterr() == ("", "")


def test_jpeg_with_data_after_its_scan_is_decoded_in_full():
    """An embedded file, a trailing byte, or one scan per colour: the image is decoded in full."""
    data = jpeg(picture(13, 200, 100))
    header = jpeg_module.read_header(data)
    assert decode.decode(jpeg_module.truncate_rows(data, header, 60)).shape == (60, 100, 3)
    for rows in (-5, 0, 193, 200, 500):
        assert jpeg_module.truncate_rows(data, header, rows) is None
    for other in (data + b"\0", data + data, data[:-2], data[:-1]):
        assert jpeg_module.truncate_rows(other, jpeg_module.read_header(other), 60) is None
    scan = data.index(b"\xff\xda")
    alone = data[: scan + 4] + b"\x01" + data[scan + 5 :]
    assert (
        jpeg_module.read_header(alone)[:2] == (100, 200)
        and not jpeg_module.read_header(alone).scan_offset
    )


def test_uniform_last_rows_are_skipped_correctly():
    """The skipped rows of a uniform image are fewer bytes than libjpeg reads ahead."""
    for height in (33, 40, 48, 49, 64):
        data, augment = jpeg(np.full((height, 40, 3), 90, np.uint8)), Augment(scale=(1.7, 1.7))
        for position in range(40):
            plain = decode.train_view(
                decode.decode(data), stream.rng_for(0, 1, position), 64, augment
            )
            drawn = decode.sample_view(data, stream.rng_for(0, 1, position), 64, augment)
            assert (decode.render_view(drawn, 64, augment) == plain).all()


def test_views_are_written_to_the_given_array():
    image, augment = picture(12, 100, 130), Augment()
    data = jpeg(image, quality=100)
    makes = [
        lambda out: decode.train_view(image, stream.rng_for(0, 1, 0), 64, augment, out),
        lambda out: scaled(data, stream.rng_for(0, 1, 0), 64, augment, out),
        lambda out: decode.evaluation_view(image, 64, Evaluate(), out),
        lambda out: decode.evaluation_view(image, 64, Evaluate(interpolation="antialias"), out),
        lambda out: decode.evaluation_view(image[:64, :64], 64, Evaluate(), out),
    ]
    for make in makes:
        batch = np.full((3, 64, 64, 3), 7, np.uint8)
        assert np.shares_memory(make(batch[1]), batch)
        assert (batch[1] == make(None)).all() and batch[1].flags.c_contiguous
        assert (batch[0] == 7).all() and (batch[2] == 7).all()


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (64, 64), (8, 8), (100, 1), (2, 300)])
@pytest.mark.parametrize("crop", [1.0, 0.8])
def test_align_corners_evaluation_matches_torch(shape, crop):
    """On noise, which would reveal any shift: rarely one level apart, never more."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    short = math.floor(64 / crop)
    new = [max(short, side * short // min(shape)) for side in shape]
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    whole = F.interpolate(pixels, new, mode="bilinear", align_corners=True)
    top, left = (int((side - 64) / 2) for side in new)
    expected = whole[0, :, top : top + 64, left : left + 64].permute(1, 2, 0).round().numpy()
    difference = np.abs(decode.evaluation_view(image, 64, Evaluate(crop_pct=crop)) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("resize, mode", [("antialias", "BILINEAR"), ("bicubic", "BICUBIC")])
@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (333, 333), (90, 64), (300, 301)])
def test_antialiased_evaluation_matches_pillow(shape, resize, mode):
    image = picture(2, *shape)
    view = decode.evaluation_view(image, 64, Evaluate(crop_pct=0.875, interpolation=resize))
    how = tv.InterpolationMode[mode]
    resized = tv.resize(Image.fromarray(image), math.floor(64 / 0.875), how)
    expected = np.asarray(tv.center_crop(resized, [64, 64])).astype(int)
    assert np.abs(view - expected).max() <= 1


@pytest.mark.parametrize("shape", [(75, 100), (101, 64), (40, 33)])
def test_align_corners_evaluation_matches_darknet(shape):
    """resize_min, then crop_image, as loops."""
    size, (height, width) = 32, shape
    image = picture(3, *shape).astype(np.float64)
    if width < height:
        w, h = size, height * size // width
    else:
        w, h = width * size // height, size
    resized = np.zeros((h, w, 3))
    for y in range(h):
        for x in range(w):
            v, u = y * (height - 1) / (h - 1), x * (width - 1) / (w - 1)
            y0, x0 = min(int(v), height - 2), min(int(u), width - 2)
            fy, fx = v - y0, u - x0
            top = (1 - fx) * image[y0, x0] + fx * image[y0, x0 + 1]
            bottom = (1 - fx) * image[y0 + 1, x0] + fx * image[y0 + 1, x0 + 1]
            resized[y, x] = (1 - fy) * top + fy * bottom
    top, left = (h - size) // 2, (w - size) // 2
    expected = resized[top : top + size, left : left + size]
    view = decode.evaluation_view(image.astype(np.uint8), size, Evaluate())
    assert np.abs(view - expected).max() <= 0.51


def test_image_smaller_than_the_view_is_enlarged():
    view = decode.evaluation_view(picture(4, 8, 8), 32, Evaluate())
    assert view.shape == (32, 32, 3) and view.any(axis=2).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P", "1"])
def test_every_mode_is_converted_to_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode in ("RGB", "L", "CMYK") else "a.png")
    Image.fromarray(picture(5)).convert(mode).save(path)
    image = decode.decode(path.read_bytes())
    assert image.shape == (60, 80, 3)
    if mode == "RGB":
        assert np.abs(image.astype(int) - np.asarray(Image.open(path))).mean() < 2


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise
    Image.fromarray(picture(6)).save(tmp_path / "a.jpg", exif=exif)
    assert decode.decode((tmp_path / "a.jpg").read_bytes()).shape == (80, 60, 3)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"GIF89a", b"not an image" * 50])
def test_undecodable_bytes_are_unreadable(data):
    with pytest.raises(decode.UnreadableError):
        decode.decode(data)


def test_channel_order_is_rgb():
    red = np.zeros((4, 4, 3), np.uint8)
    red[:, :, 2] = 255  # OpenCV writes BGR
    assert decode.decode(cv2.imencode(".png", red)[1].tobytes())[0, 0].tolist() == [255, 0, 0]


WEIGH = """
import sys
{first}
from cspnet.images.decode import LIMITED, TooLargeError, decode
from tests.bombs import BOMBS, peak
bombs = {{make.__name__: make() for make in BOMBS}}
decode(open(sys.argv[1], "rb").read())
for name, data in bombs.items():
    before = peak()
    try:
        decode(data)
        outcome = "decoded"
    except TooLargeError:
        outcome = "refused"
    print(name, outcome, peak() - before, LIMITED)
"""


@pytest.mark.parametrize("first, limited", [("", True), ("import cv2", False)])
def test_decompression_bombs_are_refused_before_allocation(tmp_path, first, limited):
    """Whether cspnet loads OpenCV, which then checks the limit itself, or it was loaded before."""
    cv2.imwrite(str(tmp_path / "a.png"), picture(7))
    done = subprocess.run(
        [sys.executable, "-c", WEIGH.format(first=first), str(tmp_path / "a.png")],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == [make.__name__ for make in BOMBS]
    for name, outcome, megabytes, by_opencv in lines:
        assert (outcome, by_opencv) == ("refused", str(limited)), name
        assert int(megabytes) < 30, f"{name} took {megabytes} MB"


def test_pixel_limit(monkeypatch):
    data = cv2.imencode(".png", picture(8, 60, 80))[1].tobytes()
    monkeypatch.setattr(decode, "LIMITED", False)
    monkeypatch.setattr(decode, "MAX_PIXELS", 60 * 80)
    assert decode.decode(data).shape == (60, 80, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(decode.TooLargeError):
        decode.decode(data)


def test_extreme_aspect_ratio_is_refused_before_allocation():
    """A single row of 30,000 pixels would become 256 rows of 7.7 million."""
    for shape in ((1, 30_000, 3), (30_000, 1, 3)):
        with pytest.raises(decode.UnreadableError, match="too long and narrow"):
            decode.evaluation_view(np.zeros(shape, np.uint8), 256, Evaluate())
    assert decode.evaluation_view(np.zeros((40, 3_000, 3), np.uint8), 256, Evaluate()).shape


def test_opencv_has_the_limit_whatever_module_loads_it_first():
    modules = "cspnet.datasets.pack", "cspnet.report.preview", "cspnet.report.mistakes"
    for module in modules:
        program = f"import {module}, cspnet.images; assert cspnet.images.LIMITED"
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
