"""Networks for other programs: folders in timm's shape, the Hugging Face hub, StableHLO, and Flax's NNX."""
