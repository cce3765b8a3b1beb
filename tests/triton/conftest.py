"""Skip the tests of the Triton kernels if triton, or NumPy, which its interpreter needs, is not installed."""

from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without("numpy", "triton")
