"""Capture: a batch goes in, and each target layer's pairs (x, dy) come out."""
