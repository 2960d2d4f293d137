"""From files to groups of images: sources, the stream, decoding, loading, augmentation."""
