"""Running things: the loop, distribution, checkpoints, evaluation, logs."""
