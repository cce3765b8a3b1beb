"""Skip the tests of the integrations if transformers or peft is not installed."""

from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without("transformers", "peft")
