"""From encoded bytes to the square that the net sees, uint8 RGB."""

import io
import math
import warnings

import cv2
import numpy as np
from PIL import Image

from cspnet.data import LIMITED, MAX_PIXELS
from cspnet.schema import Augment, Evaluate

# Workers are processes: OpenCV's own threads would only fight over the cores.
cv2.setNumThreads(0)
# Its lines on stderr name no file; Unreadable is counted and listed.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


TOO_LARGE = f"its header announces more than {MAX_PIXELS:,} pixels"
MAX_SIDE = 32_766  # warpAffine keeps coordinates in 16 bits
# What OpenCV reads and Pillow too, by Pillow's names.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "PPM", "GIF", "JPEG2000", "SUN", "AVIF")


class Unreadable(ValueError):
    """The bytes are not an image that OpenCV can decode."""


class TooLarge(Unreadable):
    """The image has, or would get, more pixels than memory should be given to."""


def decode(data: bytes) -> np.ndarray:
    """RGB uint8 [H, W, 3]; EXIF orientation is applied, grey and alpha become three channels.

    Raises Unreadable; where the header announces more than MAX_PIXELS, before memory is allocated.
    """
    if not data:
        raise Unreadable("the file is empty")
    if not LIMITED:
        _require_size(data)
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in str(error):
            raise TooLarge(TOO_LARGE) from None
        raise Unreadable(str(error).strip()) from None
    if image is None:
        raise Unreadable("not a readable image")
    return image


def _require_size(data: bytes) -> None:
    """Raises TooLarge by the header, in some 20 µs; lets pass what Pillow has no parser for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            width, height = Image.open(io.BytesIO(data), formats=FORMATS).size
        except Image.DecompressionBombError:
            raise TooLarge(TOO_LARGE) from None
        except Exception:  # of any kind, from parsers that trust the file; OpenCV has its own
            return
    if width * height > MAX_PIXELS:
        raise TooLarge(TOO_LARGE)


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
    low, high = (round(bound * size) for bound in augment.resize)
    target = rng.integers(low, high + 1)
    shorter = height if height < width * aspect else int(width * aspect)
    scale = target / max(shorter, 1)
    angle = math.radians(rng.uniform(-augment.angle, augment.angle))
    slack_x = max(0.0, (width * scale / aspect - size) / 2)
    slack_y = max(0.0, (height * scale - size) / 2)
    dx, dy = rng.uniform(-slack_x, slack_x), rng.uniform(-slack_y, slack_y)
    flip = rng.random() < augment.flip
    # View pixel (x, y) -> scaled, centred (p, q); the flip mirrors the finished view.
    direction, first = (-1, size - 1) if flip else (1, 0)
    p = np.array([direction, 0, first - size / 2 + dx]) * (aspect / scale)
    q = np.array([0, 1, -size / 2 + dy]) / scale
    cos, sin = math.cos(angle), math.sin(angle)
    centre = np.array([[0, 0, width / 2], [0, 0, height / 2]])
    return np.stack([cos * p - sin * q, sin * p + cos * q]) + centre


def train_view(image: np.ndarray, rng: np.random.Generator, size: int, augment: Augment):
    """A random view of an RGB image, uint8 [size, size, 3]: black outside the image, bilinear.

    Raises Unreadable for an image of more pixels a side than OpenCV's warp can take.
    """
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise TooLarge(f"{width}×{height} pixels: a side may have {MAX_SIDE:,}")
    return cv2.warpAffine(
        image,
        train_matrix(rng, width, height, size, augment),
        (size, size),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
    )


def evaluation_view(image: np.ndarray, size: int, how: Evaluate) -> np.ndarray:
    """The central square of the image with its shorter side resized, uint8 [size, size, 3].

    Raises Unreadable for an image so long and narrow that resizing it would fill the memory.
    """
    import torch  # seconds to import; checking files does without
    import torch.nn.functional as F

    height, width = image.shape[:2]
    short = math.floor(size / how.crop)
    if height < width:
        new_height, new_width = short, width * short // height
    else:
        new_height, new_width = height * short // width, short
    if new_width * new_height > MAX_PIXELS:
        raise TooLarge(f"{width}×{height}, too long and narrow to resize: more than {MAX_PIXELS:,}")
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]  # [1, 3, H, W], channels last
    if (height, width) != (new_height, new_width):
        antialias = how.resize == "antialias"
        if not antialias:
            pixels = pixels.float()  # the corner-aligned kernel has no exact uint8 form
        pixels = F.interpolate(
            pixels,
            (new_height, new_width),
            mode="bilinear",
            align_corners=not antialias,
            antialias=antialias,
        )
    # timm and torchvision round the offset of the crop, Darknet truncates it.
    cut = round if how.resize == "antialias" else int
    top, left = cut((new_height - size) / 2), cut((new_width - size) / 2)
    view = pixels[0, :, top : top + size, left : left + size]
    if view.is_floating_point():
        view = view.round().to(torch.uint8)
    return view.permute(1, 2, 0).contiguous().numpy()
