"""Small pure functions on tensors; nothing here imports the rest of the package."""
