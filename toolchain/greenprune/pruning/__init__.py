"""Pruning: which channels matter, who gives up how much, and surgery that proves itself."""
