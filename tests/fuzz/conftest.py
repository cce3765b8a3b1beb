"""The readers need the packages of the reference model."""

from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without("av", "soxr", "transformers", "yaml", files=("test_readers.py",))
