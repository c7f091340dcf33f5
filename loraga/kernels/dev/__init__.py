"""For developers: compile kernels ahead of time, count what a GPU is given to do."""
