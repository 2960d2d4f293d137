"""From encoded bytes to the square that the net sees, uint8 RGB."""

import contextlib
import io
import math
import warnings
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from cspnet.images import LIMITED, MAX_PIXELS
from cspnet.images import codecs, jpeg
from cspnet.images.formats import TOO_LARGE, TooLargeError, UnreadableError, opencv, upright
from cspnet.recipe.schema import Augment, Evaluate

# Workers are processes: OpenCV's own threads would only fight over the cores.
cv2.setNumThreads(0)
# Its lines on stderr name no file; Unreadable is counted and listed.
# OpenCV before 4.13 has the function elsewhere; 0 is silent.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)


MAX_SIDE = 32_766  # warpAffine keeps coordinates in 16 bits
MAX_ASPECT = 500  # longer to shorter side of an image that is evaluated
# What is read, as far as Pillow reads it too, by Pillow's names.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF")
# Flags of a reduced decode, largest first; those "of colour" mean BGR and exclude RGB.
REDUCED = {4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 1: 0}
# Rows below a view's last one that are decoded with it: those between which the warp interpolates,
# and those whose colour libjpeg interpolates.
SPARE = 10


def decode(data: bytes, reduce: int = 1) -> np.ndarray:
    """RGB uint8 [H, W, 3]: upright, grey as three equal channels, without alpha (docs/data.md).

    `reduce` is a key of REDUCED, by which both sides of a JPEG are divided, rounded up, to save
    time; other formats are decoded in full. Raises Unreadable; where the header announces more than
    MAX_PIXELS, before memory is allocated.
    """
    if not data:
        raise UnreadableError("the file is empty")
    if not LIMITED:
        _require_size(data)
    if data.startswith(jpeg.START):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | REDUCED[reduce]
        return upright(opencv(data, flags), jpeg.orientation(data))
    return upright(*codecs.read(data))


def _require_size(data: bytes) -> None:
    """Raises TooLarge by the header, in some 20 µs; lets pass what Pillow has no parser for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            width, height = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS).size
        except Image.DecompressionBombError:
            raise TooLargeError(TOO_LARGE) from None
        except Exception:  # of any kind, from parsers that trust the file; OpenCV has its own
            return
    if width * height > MAX_PIXELS:
        raise TooLargeError(TOO_LARGE)


def two_sided(rng: np.random.Generator, low: float) -> float:
    """Darknet's rand_scale: uniform in [low, 1], inverted in half of the cases."""
    factor = rng.uniform(low, 1)
    return factor if rng.random() < 0.5 else 1 / factor


def train_matrix(
    rng: np.random.Generator, width: int, height: int, size: int, augment: Augment
) -> np.ndarray:
    """Affine map from a pixel of the view to a place in the image, float64 [2, 3].

    Darknet's geometry (src/data.c load_image_augment_paths, src/image.c rotate_crop_image), its
    long-standing quirk included: the shorter side is found with width * aspect, but the image is
    scaled to width / aspect. Pixel centres sit on integers; there is no half-pixel offset.
    """
    aspect = two_sided(rng, augment.aspect)
    low, high = (round(bound * size) for bound in augment.scale)
    target = int(rng.integers(low, high + 1))
    shorter = height if height < width * aspect else int(width * aspect)
    scale = target / max(shorter, 1)
    angle = math.radians(rng.uniform(-augment.rotation, augment.rotation))
    slack_x = max(0.0, (width * scale / aspect - size) / 2)
    slack_y = max(0.0, (height * scale - size) / 2)
    dx, dy = rng.uniform(-slack_x, slack_x), rng.uniform(-slack_y, slack_y)
    flip = rng.random() < augment.flip
    # View pixel (x, y) -> scaled, centred (p, q); the flip mirrors the finished view.
    direction, first = (-1, size - 1) if flip else (1, 0)
    step_p, step_q = aspect / scale, 1 / scale
    p, q = (first - size / 2 + dx) * step_p, (-size / 2 + dy) / scale
    cos, sin = math.cos(angle), math.sin(angle)
    step_p *= direction
    return np.array(
        [
            [cos * step_p, -sin * step_q, cos * p - sin * q + width / 2],
            [sin * step_p, cos * step_q, sin * p + cos * q + height / 2],
        ]
    )


def train_view(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int,
    augment: Augment,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """A random view of an RGB image, uint8 [size, size, 3]: black outside the image, bilinear.

    It is written into `out` where that is given. Raises Unreadable for an image of more pixels a
    side than OpenCV's warp can take.
    """
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise TooLargeError(f"{width}×{height} pixels: a side may have {MAX_SIDE:,}")
    return _warp(image, train_matrix(rng, width, height, size, augment), size, out)


class SampledView(NamedTuple):
    """A view of encoded bytes, drawn but not made yet."""

    data: bytes
    random: np.random.Generator
    before: dict  # its state before the matrix was drawn
    frame: jpeg.Frame | None
    matrix: np.ndarray | None  # None where the size is not known before the image is decoded


def sample_view(data: bytes, rng: np.random.Generator, size: int, augment: Augment) -> SampledView:
    """What can be told of a random view before its image is decoded.

    Drawing many at a time, and then making them, is faster by a tenth than taking turns: the few
    microseconds of each are many where a decoder has emptied the processor's caches in between.
    """
    before, frame, matrix = rng.bit_generator.state, jpeg.frame(data), None
    if frame and max(frame[:2]) <= MAX_SIDE and frame.width * frame.height <= MAX_PIXELS:
        matrix = train_matrix(rng, frame.width, frame.height, size, augment)
    return SampledView(data, rng, before, frame, matrix)


def render_view(
    drawn: SampledView,
    size: int,
    augment: Augment,
    scaled: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """The view that `train_view` makes of the decoded image, uint8 [size, size, 3].

    Of a JPEG, the rows below the view are not decoded; the pixels are the same. With `scaled`, a
    JPEG that is shrunk by 2 or 4 anyway is decoded at a half or a quarter of its size: geometry
    stays, the pixels are those that libjpeg has averaged. Raises Unreadable as `decode` and
    `train_view` do.
    """
    data, rng, before, frame, matrix = drawn
    if matrix is not None:
        shrinks = np.hypot(*matrix[:, :2]).min()  # image pixels for a view pixel, at least
        factor = next(f for f in REDUCED if f <= max(1, shrinks)) if scaled else 1
        image = _decode_above(_bottom(matrix, size) + SPARE * factor, data, frame, factor)
        if image is not None:
            # Pixel j of the reduced image has its centre at factor * j + (factor - 1) / 2.
            matrix[:, 2] -= (factor - 1) / 2
            return _warp(image, matrix / factor, size, out)
        rng.bit_generator.state = before  # the header told something else than the decoder
    return train_view(decode(data), rng, size, augment, out)


def _bottom(matrix: np.ndarray, size: int) -> int:
    """The last row of the image that any corner of the view touches, and so any of its pixels."""
    along_x, along_y, first = matrix[1]
    return math.ceil(first + (size - 1) * (max(along_x, 0) + max(along_y, 0)))


def _decode_above(bottom: int, data: bytes, frame: jpeg.Frame, factor: int) -> np.ndarray | None:
    """The rows of a JPEG above `bottom` at least; None where its size is not what it told."""
    shorter = jpeg.cut(data, frame, bottom)
    if shorter is not None:
        with contextlib.suppress(UnreadableError):
            image = decode(shorter, factor)
            if image.shape[:2] == (-(-bottom // factor), -(-frame.width // factor)):
                return image
    image = decode(data, factor)
    expected = -(-frame.height // factor), -(-frame.width // factor)
    return image if image.shape[:2] == expected else None


def _warp(image: np.ndarray, matrix: np.ndarray, size: int, out: np.ndarray | None) -> np.ndarray:
    return cv2.warpAffine(
        image,
        matrix,
        (size, size),
        dst=out,
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
    )


def evaluation_view(
    image: np.ndarray, size: int, how: Evaluate, out: np.ndarray | None = None
) -> np.ndarray:
    """The central square of the image with its shorter side resized, uint8 [size, size, 3].

    It is written into `out` where that is given. Raises Unreadable for an image so long and narrow
    that resizing it would fill the memory: above MAX_ASPECT, and below where the view is so large
    that the resized image has more than MAX_PIXELS.
    """
    height, width = image.shape[:2]
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise TooLargeError(f"{width}×{height}, too long and narrow: more than {MAX_ASPECT} to 1")
    short = math.floor(size / how.crop_pct)
    if height < width:
        new_height, new_width = short, width * short // height
    else:
        new_height, new_width = height * short // width, short
    if new_width * new_height > MAX_PIXELS:
        raise TooLargeError(
            f"{width}×{height}, too long and narrow to resize: more than {MAX_PIXELS:,}"
        )
    if how.interpolation == "align_corners":
        return _corner_aligned(image, new_height, new_width, size, out)
    mode = "bicubic" if how.interpolation == "bicubic" else "bilinear"
    view = _antialiased(image, new_height, new_width, mode)
    # timm and torchvision round the offset of the crop, Darknet truncates it.
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    view = view[top : top + size, left : left + size]
    if out is None:
        return np.ascontiguousarray(view)
    out[:] = view
    return out


def _antialiased(image: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """PIL's bilinear or bicubic: uint8 [height, width, 3]."""
    import torch  # seconds to import; checking files does without
    import torch.nn.functional as F

    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last
    pixels = F.interpolate(pixels, (height, width), mode=mode, antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def _corner_aligned(
    image: np.ndarray, height: int, width: int, size: int, out: np.ndarray | None
) -> np.ndarray:
    """The central square of the image resized with its corners kept in place.

    Numbers and places are those of torch's F.interpolate, in float32; but only the square is
    computed, in less than half of the time.
    """
    rows, next_rows, down = _corner_places(image.shape[0], height, size)
    columns, next_columns, right = _corner_places(image.shape[1], width, size)
    first = columns[0]
    image = image[:, first : next_columns[-1] + 1]
    blended = _blend(image[rows], image[next_rows], down)
    # Turned, so that columns are picked like rows, each of them in one piece.
    turned = cv2.transpose(blended)
    blended = _blend(turned[columns - first], turned[next_columns - first], right)
    return cv2.transpose(np.rint(blended, out=blended).astype(np.uint8), dst=out)


def _corner_places(length: int, new_length: int, size: int) -> tuple[np.ndarray, ...]:
    """For each pixel of the square: indices before and after its place, share of the latter."""
    new = np.arange(size, dtype=np.float32) + int((new_length - size) / 2)
    place = new * (np.float32(length - 1) / np.float32(new_length - 1))
    before = np.minimum(place.astype(np.int64), length - 1)
    return before, np.minimum(before + 1, length - 1), place - before.astype(np.float32)


def _blend(one: np.ndarray, other: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Rows of two arrays [N, M, 3] mixed with the share [N] of the other one, float32."""
    mixed = one.astype(np.float32).reshape(len(one), -1)  # long rows: numpy's fast loop
    difference = other.astype(np.float32).reshape(mixed.shape)
    difference -= mixed
    difference *= share[:, None]
    mixed += difference
    return mixed.reshape(one.shape)
