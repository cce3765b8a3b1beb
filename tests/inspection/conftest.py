"""Skip the tests of `fastcompress inspect` if its packages are not installed."""

from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without("av", "matplotlib", "soundfile", "soxr", "tqdm")
