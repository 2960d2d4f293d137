"""From files to groups of images: sources, the stream, decoding, loading, augmentation."""

import os
import sys

MAX_PIXELS = 89_478_485  # of an image; where Pillow begins to warn of decompression bombs
# OpenCV refuses what announces more before it allocates anything. It reads the number once, when it
# is loaded; where others have loaded it by now, LIMITED is false and `decode` looks for itself.
_limit = os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
LIMITED = "cv2" not in sys.modules and _limit == str(MAX_PIXELS)
