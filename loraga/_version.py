"""The version, in the one place that packaging, the native core and users read it from."""

__version__ = "0.1.0"
