"""From encoded bytes to the network's square input, uint8 RGB."""

import contextlib
import io
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from cspnet.images import LIMITED, MAX_PIXELS, codecs, jpeg
from cspnet.images.formats import (
    TOO_LARGE,
    TooLargeError,
    UnreadableError,
    apply_orientation,
    decode_opencv,
)
from cspnet.recipe.schema import Augment, Evaluate

# Dataloader workers are processes; OpenCV's threads would only compete with them for the cores.
cv2.setNumThreads(0)
# Silence OpenCV (level 0): its lines on stderr name no file. Unreadable images are counted and
# listed by the callers.
# OpenCV before 4.13 has the function in another module.
(cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel)(0)


MAX_SIDE = 32_766  # warpAffine stores coordinates in 16 bits
MAX_ASPECT = 500  # longer to shorter side of an evaluated image
# Supported formats that Pillow can read, too, by Pillow's names.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "AVIF")
# Flags of a reduced decode, largest factor first. These are the GRAYSCALE flags, since the COLOR
# flags imply BGR and exclude RGB.
REDUCED = {4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 1: 0}
# Number of rows to decode below the last row of a view, since the warp interpolates between rows
# and libjpeg interpolates chroma.
EXTRA_ROWS = 10


def decode(data: bytes, reduce: int = 1) -> np.ndarray:
    """Decode to RGB uint8 [H, W, 3]: upright, grey as three equal channels, without alpha.

    `reduce`, a key of REDUCED, divides both sides of a JPEG, rounded up, to save time; other
    formats are decoded in full size. Raises UnreadableError; if the header declares more than
    MAX_PIXELS, before memory is allocated. docs/data.md defines the conversions.
    """
    if not data:
        raise UnreadableError("the file is empty")
    if not LIMITED:
        _require_size(data)
    if data.startswith(jpeg.SOI):
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | REDUCED[reduce]
        return apply_orientation(decode_opencv(data, flags), jpeg.orientation(data)[0])
    return apply_orientation(*codecs.read_image(data))


def _require_size(data: bytes) -> None:
    """Raise TooLargeError according to the header (20 µs); accept what Pillow cannot parse."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            width, height = Image.open(io.BytesIO(data), formats=PILLOW_FORMATS).size
        except Image.DecompressionBombError:
            raise TooLargeError(TOO_LARGE) from None
        except Exception:  # any kind, from parsers that trust their input; OpenCV reports its own
            return
    if width * height > MAX_PIXELS:
        raise TooLargeError(TOO_LARGE)


def rand_scale(rng: np.random.Generator, low: float) -> float:
    """Darknet's rand_scale: uniform in [low, 1], inverted with probability 1/2."""
    factor = rng.uniform(low, 1)
    return factor if rng.random() < 0.5 else 1 / factor


def train_matrix(
    rng: np.random.Generator, width: int, height: int, size: int, augment: Augment
) -> np.ndarray:
    """Random affine map from pixels of the view to pixels of the image, float64 [2, 3].

    Darknet's geometry (src/data.c load_image_augment_paths, src/image.c rotate_crop_image),
    including its quirk that the shorter side is computed with width * aspect, but the image is
    scaled to width / aspect. Pixel centres have integer coordinates, without a half-pixel offset.
    """
    aspect = rand_scale(rng, augment.aspect)
    low, high = (round(bound * size) for bound in augment.scale)
    target = int(rng.integers(low, high + 1))
    shorter = height if height < width * aspect else int(width * aspect)
    scale = target / max(shorter, 1)
    angle = math.radians(rng.uniform(-augment.rotation, augment.rotation))
    slack_x = max(0.0, (width * scale / aspect - size) / 2)
    slack_y = max(0.0, (height * scale - size) / 2)
    dx, dy = rng.uniform(-slack_x, slack_x), rng.uniform(-slack_y, slack_y)
    flip = rng.random() < augment.flip
    # View pixel (x, y) -> scaled, centred (p, q); the flip applies to the finished view.
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
    """A random view of an RGB image, uint8 [size, size, 3]: bilinear, black outside the image.

    It is written to `out` if given. Raises UnreadableError if a side has more pixels than
    OpenCV's warp supports.
    """
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise TooLargeError(f"{width}×{height} pixels: a side may have at most {MAX_SIDE:,}")
    return _warp(image, train_matrix(rng, width, height, size, augment), size, out)


class SampledView(NamedTuple):
    """The random parameters of a view of an image that is not decoded yet."""

    data: bytes
    rng: np.random.Generator
    rng_state: Mapping[str, Any]  # before the matrix was sampled
    header: jpeg.JpegHeader | None
    matrix: np.ndarray | None  # None if the image size is unknown before decoding


def sample_view(data: bytes, rng: np.random.Generator, size: int, augment: Augment) -> SampledView:
    """Sample the parameters of a random view, as far as possible before decoding.

    Sampling many views and then rendering them is 10 % faster than alternating, since each decode
    evicts this code and its data from the CPU caches.
    """
    rng_state, header, matrix = rng.bit_generator.state, jpeg.read_header(data), None
    if header and max(header[:2]) <= MAX_SIDE and header.width * header.height <= MAX_PIXELS:
        matrix = train_matrix(rng, header.width, header.height, size, augment)
    return SampledView(data, rng, rng_state, header, matrix)


def render_view(
    sampled: SampledView,
    size: int,
    augment: Augment,
    reduced: bool = False,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Decode an image and render a sampled view, uint8 [size, size, 3].

    The pixels are those that `train_view` renders, but rows of a JPEG below the view are not
    decoded. With `reduced`, a JPEG that the view shrinks by at least 2 or 4 is decoded at half or a
    quarter of its size: same geometry, but pixels averaged by libjpeg. Raises UnreadableError as
    `decode` and `train_view` do.
    """
    data, rng, rng_state, header, matrix = sampled
    if matrix is not None and header is not None:
        shrink = np.hypot(*matrix[:, :2]).min()  # smallest step in the image for a view pixel
        factor = next(f for f in REDUCED if f <= max(1, shrink)) if reduced else 1
        last_row = _last_row(matrix, size) + EXTRA_ROWS * factor
        image = _decode_until(last_row, data, header, factor)
        if image is not None:
            # Pixel j of the reduced image has its centre at factor * j + (factor - 1) / 2.
            matrix[:, 2] -= (factor - 1) / 2
            return _warp(image, matrix / factor, size, out)
        rng.bit_generator.state = rng_state  # header and decoder disagree on the size: start over
    return train_view(decode(data), rng, size, augment, out)


def _last_row(matrix: np.ndarray, size: int) -> int:
    """The last row of the image that a corner of the view touches, and thus any pixel of it."""
    along_x, along_y, first = matrix[1]
    return math.ceil(first + (size - 1) * (max(along_x, 0) + max(along_y, 0)))


def _decode_until(row: int, data: bytes, header: jpeg.JpegHeader, factor: int) -> np.ndarray | None:
    """Decode a JPEG up to `row` or further; None if its size is not that in its header."""
    truncated = jpeg.truncate_rows(data, header, row)
    if truncated is not None:
        with contextlib.suppress(UnreadableError):
            image = decode(truncated, factor)
            if image.shape[:2] == (-(-row // factor), -(-header.width // factor)):
                return image
    image = decode(data, factor)
    expected = -(-header.height // factor), -(-header.width // factor)
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
    image: np.ndarray, size: int, settings: Evaluate, out: np.ndarray | None = None
) -> np.ndarray:
    """Resize the shorter side and take the central square, uint8 [size, size, 3].

    It is written to `out` if given. Raises UnreadableError for an image so long and narrow that
    resizing could exhaust the memory: a ratio above MAX_ASPECT, or more than MAX_PIXELS after
    resizing.
    """
    height, width = image.shape[:2]
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise TooLargeError(f"{width}×{height}, too long and narrow: more than {MAX_ASPECT} to 1")
    short = math.floor(size / settings.crop_pct)
    if height < width:
        new_height, new_width = short, width * short // height
    else:
        new_height, new_width = height * short // width, short
    if new_width * new_height > MAX_PIXELS:
        raise TooLargeError(
            f"{width}×{height}, too long and narrow to resize: more than {MAX_PIXELS:,}"
        )
    if settings.interpolation == "align_corners":
        return _corner_aligned(image, new_height, new_width, size, out)
    mode = "bicubic" if settings.interpolation == "bicubic" else "bilinear"
    view = _antialiased(image, new_height, new_width, mode)
    # timm and torchvision round the offset of the crop; Darknet truncates it.
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    view = view[top : top + size, left : left + size]
    if out is None:
        return np.ascontiguousarray(view)
    out[:] = view
    return out


def _antialiased(image: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """Resize like PIL's antialiased bilinear or bicubic: uint8 [height, width, 3]."""
    import torch  # takes seconds; checking files does not need it
    import torch.nn.functional as F

    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last
    pixels = F.interpolate(pixels, (height, width), mode=mode, antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def _corner_aligned(
    image: np.ndarray, height: int, width: int, size: int, out: np.ndarray | None
) -> np.ndarray:
    """The central square of the image after a corner-aligned bilinear resize.

    Equal to torch's F.interpolate(align_corners=True) in float32, but only the square is computed,
    in less than half of the time.
    """
    rows, next_rows, row_weights = _corner_samples(image.shape[0], height, size)
    columns, next_columns, column_weights = _corner_samples(image.shape[1], width, size)
    first = columns[0]
    image = image[:, first : next_columns[-1] + 1]
    blended = _blend(image[rows], image[next_rows], row_weights)
    # Transpose, so that the columns are contiguous like rows.
    turned = cv2.transpose(blended)
    blended = _blend(turned[columns - first], turned[next_columns - first], column_weights)
    return cv2.transpose(np.rint(blended, out=blended).astype(np.uint8), dst=out)


def _corner_samples(
    length: int, new_length: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each pixel of the square: the two source indices, and the weight of the second one."""
    new = np.arange(size, dtype=np.float32) + int((new_length - size) / 2)
    position = new * (np.float32(length - 1) / np.float32(new_length - 1))
    before = np.minimum(position.astype(np.int64), length - 1)
    return before, np.minimum(before + 1, length - 1), position - before.astype(np.float32)


def _blend(one: np.ndarray, other: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Interpolate rows of two arrays [N, M, 3] with the weights [N] of the other one, float32."""
    mixed = one.astype(np.float32).reshape(len(one), -1)  # long rows are faster in numpy
    difference = other.astype(np.float32).reshape(mixed.shape)
    difference -= mixed
    difference *= weights[:, None]
    mixed += difference
    return mixed.reshape(one.shape)
