"""The version, apart from anything that needs torch, so that the build can read it."""

__version__ = "0.1.0"
