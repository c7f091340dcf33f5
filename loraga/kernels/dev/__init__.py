"""For developers: compile kernels ahead of time."""
