"""Error rates and speed of a model on manifests."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcompress.audio import AudioError
from fastcompress.decoder.generation import unwrap
from fastcompress.decoder.limits import counting_answers
from fastcompress.training.examples import Examples
from fastcompress.training.normalization import normalizer
from fastcompress.training.scores import character_errors, confidence_interval, total, word_errors


@dataclass(frozen=True)
class Result:
    """Scores of one manifest.

    Attributes:
        utterances: Number of scored utterances.
        words: Words of their references.
        wer: Word error rate of all utterances together, in %.
        wer_low: Lower end of the 95 % confidence interval of ``wer``, by a bootstrap over utterances.
        wer_high: Upper end.
        cer: Character error rate of all utterances together, in %.
        exact: Utterances without an error, in %.
        bleu: Corpus BLEU (sacrebleu), 0 to 100.
        seconds: Seconds of audio that were decoded.
        frames_per_second: Frames per second of audio.
        tokens_per_second: Audio tokens per second of audio.
        ratio: Frames per token.
        prefill_ms: Median time to compress, pack and decode the prompt of one utterance.
        encode_ms: Median time of the encoder on one utterance; about 0 for ``EncodedExamples``.
        written_per_second: Generated tokens per second, in batches.
        peak_bytes: Peak memory: allocated by decoding on a GPU, of the whole process so far on the CPU.
        skipped: Utterances with damaged audio, which no other number includes.
        clipped: Texts that were cut at the limit of new tokens.
    """

    utterances: int
    words: int
    wer: float
    wer_low: float
    wer_high: float
    cer: float
    exact: float
    bleu: float
    seconds: float
    frames_per_second: float
    tokens_per_second: float
    ratio: float
    prefill_ms: float
    encode_ms: float
    written_per_second: float
    peak_bytes: int
    skipped: int
    clipped: int


@counting_answers()  # this function counts cut answers over all batches
@torch.inference_mode()
def transcribe(
    model: Any,
    examples: Examples,
    batch_size: int = 16,
    progress: Callable[[int], object] | None = None,
    **generation: Any,
) -> tuple[list[str | None], dict[str, float]]:
    """Transcribe utterances; those of similar length share a batch.

    Args:
        model: A ``FastCompressForConditionalGeneration``, with or without LoRA.
        examples: Utterances.
        batch_size: Utterances per batch.
        progress: Called with the number of utterances that are done.
        generation: Arguments of ``generate``.

    Returns:
        The text of each utterance, ``None`` for damaged audio; and counts of tokens, frames, seconds, and texts that
        were cut at the limit of new tokens.
    """
    model.eval()
    base = unwrap(model)
    tokenizer = examples.processor.tokenizer
    order = sorted(range(len(examples)), key=lambda i: examples.utterances[i].duration or 0.0)
    written: list[str | None] = [None] * len(order)
    totals = {"audio_tokens": 0.0, "frames": 0.0, "written": 0.0, "seconds": 0.0, "clipped": 0.0}
    ends = end_tokens(base, tokenizer)
    done = 0
    for begin in range(0, len(order), batch_size):
        indices = [i for i in order[begin : begin + batch_size] if examples.is_usable(i)]
        done += len(order[begin : begin + batch_size])
        if not indices:
            continue
        batch = {k: v.to(base.device) for k, v in examples.batch(indices, targets=False).items()}
        frames = lengths = None
        if "frames" in batch or "input_features" in batch:
            frames, lengths = _encoded(base, batch)
            totals["frames"] += int(lengths.sum())
            totals["audio_tokens"] += len(base.compress(frames, lengths).values)
        since = time.perf_counter()
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            frames=frames,
            frame_lengths=lengths,
            **generation,
        )
        new = out[:: len(out) // len(indices), batch["input_ids"].shape[1] :]
        totals["seconds"] += time.perf_counter() - since
        totals["written"] += int((new != tokenizer.pad_token_id).sum())
        totals["clipped"] += count_clipped(new, ends)
        for index, text in zip(indices, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            written[index] = text.strip()
        if progress is not None:
            progress(done)
    return written, totals


def evaluate(
    model: Any,
    examples: Examples,
    batch_size: int = 16,
    timed: int = 10,
    progress: Callable[[int], object] | None = None,
    normalize: str = "none",
    **generation: Any,
) -> tuple[Result, list[str | None]]:
    """Score a model on the utterances of a manifest.

    Args:
        model: A ``FastCompressForConditionalGeneration``, with or without LoRA.
        examples: Utterances, whose targets are the references.
        batch_size: Utterances per batch.
        timed: Largest number of utterances on which encoder and prefill are timed, spread over the lengths. 0: none.
        progress: Called with the number of utterances that are done.
        normalize: Name of the normalization of references and texts before they are compared
            (``fastcompress.training.normalization``).
        generation: Arguments of ``generate``; by default greedy search of at most 128 tokens.

    Returns:
        The scores, and the text of each utterance, ``None`` for damaged audio.

    Raises:
        AudioError: No utterance has usable audio.
    """
    import sacrebleu

    normalized = normalizer(normalize)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    settings = {"max_new_tokens": 128, "do_sample": False} | generation
    written, totals = transcribe(model, examples, batch_size, progress, **settings)
    if cuda:
        peak = torch.cuda.max_memory_allocated(model.device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scored = [(u, w) for u, w in zip(examples.utterances, written, strict=True) if w is not None]
    if not scored:
        raise AudioError(f"no usable audio: {next(iter(examples.skipped.values()))}")
    references, hypotheses = [normalized(u.target) for u, _ in scored], [normalized(w) for _, w in scored]
    counts = word_errors(references, hypotheses)
    low, high = confidence_interval(counts)
    words = total(counts)
    seconds = sum(examples.seconds[i] for i, w in enumerate(written) if w is not None and i in examples.seconds)
    encode_ms, prefill_ms = _times(model, examples, timed)
    result = Result(
        utterances=len(references),
        words=words.length,
        wer=words.rate,
        wer_low=low,
        wer_high=high,
        cer=total(character_errors(references, hypotheses)).rate,
        exact=100 * statistics.fmean(r == w for r, w in zip(references, hypotheses, strict=True)),
        bleu=float(sacrebleu.corpus_bleu(hypotheses, [references], force=True).score),
        seconds=seconds,
        frames_per_second=totals["frames"] / seconds if seconds else 0.0,
        tokens_per_second=totals["audio_tokens"] / seconds if seconds else 0.0,
        ratio=totals["frames"] / max(1.0, totals["audio_tokens"]),
        prefill_ms=prefill_ms,
        encode_ms=encode_ms,
        written_per_second=totals["written"] / max(1e-9, totals["seconds"]),
        peak_bytes=peak,
        skipped=len(examples.skipped),
        clipped=int(totals["clipped"]),
    )
    return result, written


def count_clipped(new: Tensor, ends: Sequence[int]) -> int:
    """Return how many rows of new ids ``[B, L]`` end without an end token: the limit of new tokens cut them."""
    if not new.numel():
        return 0
    return int((~torch.isin(new, torch.tensor(ends, device=new.device)).any(1)).sum())


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids after which generation ends, and that of the padding, which follows them."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [i for i in {*ends, tokenizer.eos_token_id, tokenizer.pad_token_id} if i is not None]


def _encoded(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the frames of a batch's audio, which ``EncodedExamples`` have already."""
    if "frames" in batch:
        return batch["frames"], batch["frame_lengths"]
    return model.encode(batch["input_features"], batch["feature_attention_mask"])


@torch.inference_mode()
def _times(model: Any, examples: Examples, count: int) -> tuple[float, float]:
    """Return the median times of encoder and prefill on one utterance, in ms."""
    base = unwrap(model)
    order = sorted(
        (i for i, u in enumerate(examples.utterances) if u.has_audio and i not in examples.skipped),
        key=lambda i: examples.utterances[i].duration or 0.0,
    )
    count = min(count, len(order))
    chosen = [order[i * len(order) // count] for i in range(count)]
    encoding, prefill = [], []
    for index in chosen:
        batch = {k: v.to(base.device) for k, v in examples.batch([index], targets=False).items()}
        for _ in range(3):  # keeps the last; the first warms up
            since = _now(base.device)
            frames, lengths = _encoded(base, batch)
            middle = _now(base.device)
            packed = base.pack(batch["input_ids"], batch["attention_mask"], frames, lengths)
            base.prefill(packed)
            end = _now(base.device)
        encoding.append(1e3 * (middle - since))
        prefill.append(1e3 * (end - middle))
    if not chosen:
        return 0.0, 0.0
    return statistics.median(encoding), statistics.median(prefill)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
