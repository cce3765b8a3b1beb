"""Triton kernels of the ops in ``fastcompress.reference.OPS``, for GPUs that the compiled kernels do not support.

``pack_map`` and ``pack_labels`` have no Triton kernel; they run on the reference.

Importing this package imports triton. The ops take the same arguments as the reference and return the same bits, on any
device that Triton supports, and on the CPU with ``TRITON_INTERPRET=1``. Tile sizes depend only on the row width and the
dtype; nothing is tuned at run time.
"""

from importlib import import_module

from fastcompress import reference

_FILES = (
    "adjacent_distance", "banded_distance", "greedy_segments", "integrate_and_fire", "min_variance", "pack",
    "segment_pool", "segment_reduce", "select_boundaries",
)  # fmt: skip
_FUNCTIONS = {name: value for file in _FILES for name, value in vars(import_module(f"{__name__}.{file}")).items()}

#: Functions of the ops that have a Triton kernel, by name of the op.
OPS = {name: _FUNCTIONS[name] for name in reference.OPS if name in _FUNCTIONS}
