"""Training and evaluation: the loop, and what it stands on."""
