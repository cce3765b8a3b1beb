"""Tests of the packed decoder need transformers."""

from tests.support.skips import only_on_the_cpu, skip_without

pytest_pycollect_makemodule = skip_without("transformers")
pytest_itemcollected = only_on_the_cpu
