"""Skip the tests of the emulated kernels if pybind11, which binds them, is not installed."""

from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without(
    "pybind11", files=("test_cuda_emulation.py", "test_cuda_emulator.py", "test_greedy_emulation.py")
)
