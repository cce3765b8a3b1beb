"""Run one vLLM engine in this process and print what it generates, and what transformers generates, as JSON.

``python -m tests.support.vllm_engine FAMILY RULE`` runs in a process of its own: vLLM keeps its configuration for the
life of a process, and the tests fill uninitialized memory with NaN, which its KV cache cannot have.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.support import ROOT, served_llms, torchvision_stub

TOKENS = 12
#: Seconds of the audios of each prompt: short and long, one and two audios, one and two windows of 30 s.
PROMPTS: dict[str, tuple[tuple[float, ...], ...]] = {
    "qwen2_audio": ((2.0,), (3.37,), (0.45,), (1.0, 6.2), (29.9,), ()),
    "glmasr": ((2.0,), (3.37,), (0.45,), (41.3,), (60.0,), ()),
    "audioflamingo3": ((2.0,), (3.37,), (0.45,), (41.3,), (60.0,), ()),
    "qwen3_asr": ((2.0,), (3.37,), (0.65,), (20.3,), (29.5,), ()),  # vLLM takes no more than 30 s with these settings
}
ENDINGS = ("write what you hear", "low high five")
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 2048, "max_num_seqs": 8,
    "distributed_executor_backend": "uni", "enable_prefix_caching": True, "seed": 0, "enable_mm_embeds": True,
    # Fewer than the tokens of most audios, so that the prefill of an audio takes several steps.
    "max_num_batched_tokens": 64,
}  # fmt: skip


def start(folder: Path, key: Any, **settings: Any) -> Any:
    """Return an engine in this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(ROOT / "out" / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    torchvision_stub.install()
    import transformers
    from vllm import LLM, ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    for name in transformers.AutoConfig.from_pretrained(folder).architectures:
        # The class replaces its name, since vLLM inspects a class that it knows by name in a new process.
        ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())
    overrides = {} if key is None else {"hf_overrides": {"fastcompress": key}}
    return LLM(model=str(folder), **SETTINGS | overrides | settings)


def load(folder: Path) -> tuple[Any, Any]:
    """Return the model and the processor of transformers."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32).eval()
    return model, transformers.AutoProcessor.from_pretrained(folder)


def inputs(name: str, processor: Any, audios: list[Any], ending: str) -> Any:
    """Return the arguments of a model of transformers for one prompt."""
    text = served_llms.prompt(name, len(audios), ending)
    if not audios:
        return processor.tokenizer([text], return_tensors="pt")
    return processor(text=[text], audio=audios, return_tensors="pt", sampling_rate=served_llms.RATE)


def generate(model: Any, arguments: Any) -> list[int]:
    """Return the ids that a model of transformers writes."""
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        out = model.generate(**arguments, **settings)
    return out[0, -TOKENS:].tolist()


def generate_from(model: Any, ids: torch.Tensor, pooled: torch.Tensor) -> list[int]:
    """Return the ids that a model of transformers writes if the placeholders of its only audio are these tokens."""
    audio = (ids == model.config.audio_token_id).nonzero()[:, 0]
    with torch.no_grad():
        text = model.get_input_embeddings()(ids)
    rows = torch.cat([text[: audio[0]], pooled, text[audio[-1] + 1 :]])[None]
    return generate(model, {"inputs_embeds": rows, "attention_mask": torch.ones(rows.shape[:2], dtype=torch.long)})


def serve(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the ids that an engine writes, and the lengths of its prompts."""
    from vllm import SamplingParams

    outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True), use_tqdm=False)
    return [
        {
            "ids": list(output.outputs[0].token_ids),
            "prompt": len(output.prompt_token_ids),
            "cached": output.num_cached_tokens or 0,
        }
        for output in outputs
    ]


def request(name: str, audios: list[Any], ending: str) -> dict[str, Any]:
    """Return a request of an engine."""
    data = {"multi_modal_data": {"audio": [(audio, served_llms.RATE) for audio in audios]}} if audios else {}
    return {"prompt": served_llms.prompt(name, len(audios), ending), **data}


def compare(name: str, rule: str) -> dict[str, Any]:
    """Run transformers and an engine on the same prompts, and return what they write."""
    from fastcompress.integrations.transformers import BudgetProcessor, apply_to
    from fastcompress.integrations.vllm import embed

    folder = served_llms.write(name, Path(tempfile.mkdtemp(prefix="fastcompress-vllm-")))
    model, processor = load(folder)
    audios = [
        [served_llms.speech(seconds, seed=10 * i + j) for j, seconds in enumerate(row)]
        for i, row in enumerate(PROMPTS[name])
    ]
    found: dict[str, Any] = {"stock": [], "transformers": [], "second": []}
    found["stock"] = [inputs(name, processor, row, ENDINGS[0])["input_ids"].shape[1] for row in audios]
    family = served_llms.FAMILIES[name]
    if family.embeds:
        first = inputs(name, processor, audios[0], ENDINGS[0])
        (pooled,) = embed(model, first, "local-max")
        found["embeds"] = {"tokens": len(pooled), "transformers": generate_from(model, first["input_ids"][0], pooled)}
    apply_to(model, rule, "budget")
    budget = BudgetProcessor(processor, model)
    for ending, key in zip(ENDINGS, ("transformers", "second"), strict=True):
        for row in audios:
            arguments = budget.shorten(inputs(name, processor, row, ending))
            found[key].append({"ids": generate(model, arguments), "prompt": arguments["input_ids"].shape[1]})
    llm = start(folder, {"rule": rule}, limit_mm_per_prompt={"audio": 2 if family.several else 1})
    requests = [request(name, row, ENDINGS[0]) for row in audios]
    found["vllm"] = serve(llm, requests)
    found["again"] = serve(llm, requests)
    found["vllm_second"] = serve(llm, [request(name, row, ENDINGS[1]) for row in audios])
    if family.embeds:
        embeds = {"audio": {"audio_embeds": [pooled]}}
        served = serve(llm, [{"prompt": served_llms.prompt(name, 1, ENDINGS[0]), "multi_modal_data": embeds}])
        found["embeds"]["vllm"] = served[0]["ids"]
    found["error"] = wrong_count(llm, request(name, [served_llms.speech(2.5, seed=99)], ENDINGS[0]))
    return found


def wrong_count(llm: Any, asked: dict[str, Any]) -> str:
    """Let the model pool less than its prompts announce, and return the error of a request."""
    from fastcompress.integrations.vllm.settings import Compression
    from fastcompress.rules import Uniform

    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    stock, model.fastcompress = model.fastcompress, Compression(Uniform(2))
    try:
        serve(llm, [asked])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        model.fastcompress = stock
    return ""


if __name__ == "__main__":
    result = compare(*sys.argv[1:3])
    print("RESULT " + json.dumps(result), flush=True)
