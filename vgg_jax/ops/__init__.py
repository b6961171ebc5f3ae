"""Operations that VGG needs and that JAX lacks or computes slowly."""
