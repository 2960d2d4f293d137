"""Pictures of what the net sees."""

from pathlib import Path

import cv2
import numpy as np
import torch


def sheet(images: torch.Tensor, columns: int = 8) -> np.ndarray:
    """Images in [0, 1], float [N, 3, S, S], as one picture, uint8 RGB, two pixels apart."""
    tiles = (images.detach().float().cpu() * 255).round().to(torch.uint8)
    tiles = tiles.permute(0, 2, 3, 1).numpy()  # [N, S, S, 3]
    count, size = tiles.shape[:2]
    rows = -(-count // columns)
    page = np.full((rows * (size + 2), columns * (size + 2), 3), 255, np.uint8)
    for number, tile in enumerate(tiles):
        top, left = (size + 2) * (number // columns), (size + 2) * (number % columns)
        page[top : top + size, left : left + size] = tile
    return page


def write_png(path: Path, picture: np.ndarray) -> None:
    """An RGB picture, uint8 [H, W, 3], as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), picture[:, :, ::-1])
