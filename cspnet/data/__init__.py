"""Batches: the order of the images, dataloader workers, augmentation on the device."""
