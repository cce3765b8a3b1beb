"""Tests of the integrations need transformers and peft."""

from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without("transformers", "peft")
