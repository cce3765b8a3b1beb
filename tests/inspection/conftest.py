"""Tests of `fastcompress inspect` need its packages."""

from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without("av", "matplotlib", "soundfile", "soxr", "tqdm")
