"""Images: from encoded bytes to RGB pixels of the size that the network needs."""

import os
import sys

MAX_PIXELS = 89_478_485  # per image; Pillow's threshold for decompression bombs
# OpenCV refuses larger images before it allocates memory. It reads the limit once, when it is
# loaded. If other code has loaded it already, LIMITED is False and `decode` checks the header
# itself.
_limit = os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_PIXELS))
LIMITED = "cv2" not in sys.modules and _limit == str(MAX_PIXELS)
