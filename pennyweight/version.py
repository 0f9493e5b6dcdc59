"""The version of Pennyweight."""

__version__ = "0.1.0"
