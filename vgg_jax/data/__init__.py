"""Data: records on disk become batches of uint8 images on the devices, which augment and normalize them."""
