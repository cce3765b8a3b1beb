"""Skip the tests of synthetic speech if espeak-ng is not installed."""

from tests.support.skips import only_on_the_cpu, skip_without

pytest_pycollect_makemodule = skip_without("av", "espeakng_loader", "scipy", "soundfile", files=("test_data.py",))
pytest_itemcollected = only_on_the_cpu
