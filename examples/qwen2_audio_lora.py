"""Train LoRA on a Qwen2-Audio whose decoder reads a third of the audio tokens, as in arXiv 2511.20973.

    python examples/qwen2_audio_lora.py --tiny
    python examples/qwen2_audio_lora.py --model Qwen/Qwen2-Audio-7B-Instruct --data train.jsonl --output-dir adapter

`--tiny` uses random weights and random audio. It runs the whole example in seconds, without a download. With `--model`,
a name or a folder, `--data` is a manifest with one line of JSON per utterance (docs/speech.md). `fastcompress finetune`
does the same with transformers' Trainer, on several GPUs, with checkpoints and scores; this example has a training loop
that you can edit. It has not been run with real weights.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoProcessor, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from fastcompress.integrations.transformers import apply_to
from fastcompress.training.finetuning import Conversations
from fastcompress.training.manifest import read_manifest

AUDIO = 99  # the placeholder's id of the tiny model


def tiny_model() -> Any:
    config = Qwen2AudioConfig(
        audio_config={"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                      "num_mel_bins": 16, "max_source_positions": 50},
        text_config={"model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
                     "initializer_range": 0.3},
        audio_token_id=AUDIO,
    )  # fmt: skip
    return Qwen2AudioForConditionalGeneration(config)


def tiny_batches(size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the same samples repeatedly: one second of noise, 25 placeholders, and an answer of four ids."""
    prompt = torch.tensor([1, *[AUDIO] * 25, 2]).expand(size, -1)
    answer = torch.randint(3, 90, (size, 4))
    batch = {
        "input_ids": torch.cat([prompt, answer], 1),
        "attention_mask": torch.ones(size, prompt.shape[1] + 4, dtype=torch.long),
        "labels": torch.cat([torch.full_like(prompt, -100), answer], 1),
        "input_features": torch.randn(size, 16, 100),
        "feature_attention_mask": torch.ones(size, 100, dtype=torch.long),
    }
    return itertools.repeat(batch)


def batches(model: str, manifest: str, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches of utterances in random order, each with the processor's chat template."""
    conversations = Conversations(AutoProcessor.from_pretrained(model), "Transcribe the speech.")
    utterances = read_manifest(manifest)
    while True:
        for chosen in torch.randperm(len(utterances)).split(size):
            yield conversations([utterances[i] for i in chosen.tolist()])


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tiny", action="store_true", help="random weights, random audio")
    what.add_argument("--model", help="name or folder of a Qwen2-Audio")
    parser.add_argument("--data", help="manifest to train on; needed by --model")
    parser.add_argument("--rule", default="uniform:3", help="compression rule (default: uniform:3)")
    parser.add_argument("--max-steps", type=int, default=30, help="updates of the weights (default: 30)")
    parser.add_argument("--per-device-train-batch-size", type=int, default=4, help="utterances per batch (default: 4)")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-4; 1e-2 with --tiny")
    parser.add_argument("--output-dir", help="folder for the adapter")
    arguments = parser.parse_args(argv)
    if arguments.model and not arguments.data:
        parser.error("--model needs --data")

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.tiny:
        model, data = tiny_model(), tiny_batches(arguments.per_device_train_batch_size)
    else:
        model = Qwen2AudioForConditionalGeneration.from_pretrained(arguments.model, dtype=torch.bfloat16)
        data = batches(arguments.model, arguments.data, arguments.per_device_train_batch_size)
    apply_to(model.to(device), arguments.rule)
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        modules_to_save=["multi_modal_projector"],  # the projector is trained in full
        target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
    )
    model = get_peft_model(model, lora).train()
    model.print_trainable_parameters()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()  # in bf16, small updates and AdamW's moments would round to 0
    rate = arguments.learning_rate or (1e-2 if arguments.tiny else 1e-4)
    optimizer = torch.optim.AdamW(trained, lr=rate)

    losses = []
    for step, batch in zip(range(arguments.max_steps), data, strict=False):
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=not arguments.tiny):
            output = model(**batch)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(output.loss.item())
        rows = output.compressed.inputs_embeds.shape[0]
        print(f"step {step:3}  loss {losses[-1]:.3f}  {int(batch['attention_mask'].sum())} rows became {rows}")
    if arguments.output_dir:
        model.save_pretrained(arguments.output_dir)
        print(f"wrote {arguments.output_dir}; load it with PeftModel.from_pretrained after apply_to")
    return losses


if __name__ == "__main__":
    main()
