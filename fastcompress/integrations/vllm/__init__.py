"""Serve compressed audio LLMs with vLLM: audio takes fewer tokens of the prompt and of the key-value cache.

vLLM loads this plug-in through the entry point ``vllm.general_plugins``, so that user code imports and patches nothing.
A model is compressed if its configuration has the key ``fastcompress``. Other models are not changed.
Importing this module imports neither vllm nor transformers. docs/serving.md is the guide.
"""

from fastcompress.integrations.vllm.embeds import embed
from fastcompress.integrations.vllm.families import FAMILIES, REFUSED, TESTED

__all__ = ["embed", "register"]


def register() -> None:
    """Register the compressed model classes under the names of the architectures that vLLM has.

    vLLM calls this function in each of its processes. The classes are imported when a model is loaded.
    """
    from vllm import ModelRegistry
    from vllm import __version__ as version
    from vllm.logger import init_logger

    logger = init_logger("vllm.fastcompress")
    if not version.startswith(f"{TESTED}."):
        logger.warning("fastcompress is tested with vLLM %s, not with %s", TESTED, version)
    known = ModelRegistry.get_supported_archs()
    # vLLM caches properties of a class by its name and file, so the name contains the version of the stock class.
    suffix = "_vllm_" + "".join(c if c.isalnum() else "_" for c in version)
    for architecture in [name for family in (*FAMILIES, *REFUSED) for name in family.architectures]:
        if architecture in known:
            ModelRegistry.register_model(architecture, f"fastcompress.integrations.vllm.models:{architecture}{suffix}")
