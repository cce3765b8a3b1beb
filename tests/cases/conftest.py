"""Cases of manifests and commands need the packages of the reference model."""

from tests.support.skips import skip_without

pytest_pycollect_makemodule = skip_without(
    "accelerate", "jiwer", "peft", "soundfile", "transformers", files=("test_speech.py",)
)
