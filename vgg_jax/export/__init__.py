"""Networks for other programs: ONNX, StableHLO, folders in timm's shape, the Hugging Face hub, and Flax's NNX."""
