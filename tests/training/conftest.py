"""Skip the tests of training if packages of the reference model are not installed."""

from tests.support.skips import only_on_the_cpu, skip_without

pytest_pycollect_makemodule = skip_without(
    "accelerate", "av", "jiwer", "jsonargparse", "peft", "soundfile", "transformers", "yaml"
)
pytest_itemcollected = only_on_the_cpu
