"""Skip the tests of the experiment if packages of the reference model are not installed."""

from tests.support.skips import only_on_the_cpu, skip_without

pytest_pycollect_makemodule = skip_without("av", "transformers", "peft", "soundfile")
pytest_itemcollected = only_on_the_cpu
