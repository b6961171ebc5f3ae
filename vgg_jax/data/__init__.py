"""Data: TFDS records to batches of uint8 images on the devices, and their augmentation there."""
