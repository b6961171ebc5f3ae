"""Training: the loop, the step, the state, checkpoints."""
