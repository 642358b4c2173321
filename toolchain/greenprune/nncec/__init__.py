"""The carbon account from the first training step to the last inference (device side)."""
