"""Tests of the Triton kernels need triton, and NumPy for its interpreter."""

from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without("numpy", "triton")
