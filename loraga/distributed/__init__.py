"""Several processes, one adapter."""
