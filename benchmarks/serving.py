"""What compression saves in vLLM: time to first token, blocks of the key-value cache, audio that fits the cache.

``python -m benchmarks.serving`` runs in the environment of ``make vllm-test`` and prints a table. It writes a
Qwen2-Audio with random weights that is as wide as Qwen2-Audio-7B and has 2 of its 32 layers in both encoder and
decoder, so that their costs relative to each other are about those of the real model. Each measurement is one engine in
a process of its own; the rates alternate.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RULES = ("none", "uniform:2", "uniform:3")
SECONDS, RATE = 30, 16000
PROMPT = "<|audio_bos|><|AUDIO|><|audio_eos|> w1 w2 w3 w4 w5 w6 w7 w8"
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "enforce_eager": True, "block_size": 32, "max_model_len": 1024, "max_num_seqs": 1,
    "max_num_batched_tokens": 1024, "distributed_executor_backend": "uni", "seed": 0, "mm_processor_cache_gb": 0,
    # Every request is computed from scratch.
    "enable_prefix_caching": False,
}  # fmt: skip


def write(folder: Path) -> None:
    """Write the model and its processor."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_tokens(special, special_tokens=True)
    config: Any = transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "encoder_layers": 2},  # the other sizes are its defaults
        text_config={
            "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 32, "tie_word_embeddings": False,
            "max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        audio_token_index=len(words),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen2AudioForConditionalGeneration(config).save_pretrained(folder)
    extractor = transformers.WhisperFeatureExtractor(feature_size=128)  # the default of the encoder
    transformers.Qwen2AudioProcessor(extractor, tokenizer).save_pretrained(folder)


def measure(folder: Path, rule: str, requests: int) -> dict[str, float]:
    """Return the median time to first token of an engine, and the size of its cache."""
    import numpy as np
    from vllm import LLM, SamplingParams

    overrides = {} if rule == "none" else {"hf_overrides": {"fastcompress": {"rule": rule}}}
    llm = LLM(model=str(folder), **SETTINGS, **overrides)
    one = SamplingParams(temperature=0, max_tokens=1)
    times = []
    for seed in range(requests + 1):
        audio = np.random.default_rng(seed).standard_normal(SECONDS * RATE).astype(np.float32)
        asked = {"prompt": PROMPT, "multi_modal_data": {"audio": (audio, RATE)}}
        start = time.perf_counter()
        (output,) = llm.generate([asked], one, use_tqdm=False)
        times.append(time.perf_counter() - start)
    blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    tokens = len(output.prompt_token_ids)
    return {"seconds": statistics.median(times[1:]), "tokens": tokens, "blocks": -(-tokens // 32), "cache": blocks}


def run(folder: Path, rule: str, requests: int) -> dict[str, float]:
    """Measure in a new process."""
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CACHE_ROOT": str(folder / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.serving", "--measure", rule, "--folder", str(folder)]
    done = subprocess.run(
        [*command, "--requests", str(requests)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the engine with {rule} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Return the results as Markdown; times are medians over the processes."""
    base = statistics.median(one["seconds"] for one in found["none"])
    lines = [
        "| rule | tokens of the prompt | time to first token | relative | blocks per prompt | audio in the cache |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rule, results in found.items():
        seconds = statistics.median(one["seconds"] for one in results)
        first = results[0]
        minutes = first["cache"] // first["blocks"] * SECONDS / 60
        lines.append(
            f"| {rule} | {first['tokens']} | {seconds:.2f} s | {seconds / base:.2f} | {first['blocks']} "
            f"| {minutes:.1f} min |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=3, help="processes per rule")
    parser.add_argument("--requests", type=int, default=3, help="requests per process, after one to warm up")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=RULES, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.measure:
        print(json.dumps(measure(settings.folder, settings.measure, settings.requests)))
        return
    with tempfile.TemporaryDirectory(prefix="fastcompress-serving-") as folder:
        write(Path(folder))
        found: dict[str, list[dict[str, float]]] = {rule: [] for rule in RULES}
        for _ in range(settings.repeat):
            for rule in RULES:
                found[rule].append(run(Path(folder), rule, settings.requests))
                print(rule, found[rule][-1], file=sys.stderr, flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
