"""Skip the tests of the reference model's commands if its packages are not installed."""

from tests.support.skips import only_on_the_cpu, skip_without

pytest_pycollect_makemodule = skip_without(
    "accelerate",
    "av",
    "jsonargparse",
    "transformers",
    "soundfile",
    "soxr",
    files=("test_lalm.py", "test_lalm_errors.py", "test_output.py", "test_settings.py", "test_sweep.py"),
)
pytest_itemcollected = only_on_the_cpu
