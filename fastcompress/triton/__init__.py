"""Triton kernels: the ops of ``fastcompress.reference.OPS``, for devices for which there are no compiled kernels.
Those with no row wider than a number, of packing, are left to the reference.

Importing this package imports triton. The ops take and return what those of the reference do, with the same bits, on
any device that Triton runs on (under ``TRITON_INTERPRET=1`` the CPU). Each takes its tile sizes from the row width and
the dtype by a fixed rule; nothing is tuned at run time.
"""

from importlib import import_module

from fastcompress import reference

_FILES = (
    "adjacent_distance", "greedy_segments", "integrate_and_fire", "pack", "segment_pool", "segment_reduce",
    "select_boundaries",
)  # fmt: skip
_FUNCTIONS = {name: value for file in _FILES for name, value in vars(import_module(f"{__name__}.{file}")).items()}

#: The ops of ``reference.OPS`` that have a Triton kernel, by name.
OPS = {name: _FUNCTIONS[name] for name in reference.OPS if name in _FUNCTIONS}
