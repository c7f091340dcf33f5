"""The command `loraga`."""
