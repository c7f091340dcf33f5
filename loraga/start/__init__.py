"""The start: factors of a gradient become A and B. Knows tensors only."""
