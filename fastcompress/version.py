"""The version, in a module that does not import torch, so that the build can read it."""

__version__ = "0.1.0"
