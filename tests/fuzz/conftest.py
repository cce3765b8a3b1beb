"""Skip the tests of the readers if packages of the reference model are not installed."""

from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without("av", "soxr", "transformers", "yaml", files=("test_readers.py",))
