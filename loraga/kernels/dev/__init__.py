"""For developers: compile kernels ahead of time, search block sizes."""
