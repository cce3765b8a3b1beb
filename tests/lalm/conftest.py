"""Skip the tests of the reference model if its packages are not installed."""

from tests.support.skips import only_on_the_cpu, skip_without

pytest_pycollect_makemodule = skip_without("av", "accelerate", "peft", "soundfile", "transformers")
pytest_itemcollected = only_on_the_cpu
