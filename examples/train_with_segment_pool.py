"""A training loop for a model with `segment_pool` between its encoder and its head.

    python examples/train_with_segment_pool.py
    python examples/train_with_segment_pool.py --rule uniform:4

The frames are synthetic: each clip is a sequence of "phones" of 2 to 9 frames. The model predicts the phone of every
token. The label is the phone of the middle frame of the token's segment.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import fastcompress as fc

PHONES, WIDTH = 12, 32


def make_batch(clips: int, voices: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy frames [N, WIDTH] of packed clips, `cu_seqlens` [B + 1] int32, and the phone of each frame [N]."""
    phones, offsets = [], [0]
    for _ in range(clips):
        said = torch.randint(0, PHONES, (int(torch.randint(5, 15, (), generator=g)),), generator=g)
        phones.append(said.repeat_interleave(torch.randint(2, 10, said.shape, generator=g)))
        offsets.append(offsets[-1] + len(phones[-1]))
    phone = torch.cat(phones)
    frames = voices[phone] + 0.5 * torch.randn(len(phone), WIDTH, generator=g)
    return frames, torch.tensor(offsets, dtype=torch.int32), phone


class Model(nn.Module):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, 64))
        self.pool = fc.nn.SegmentPool(rule)
        self.head = nn.Linear(64, PHONES)

    def forward(self, frames: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, fc.Pooled]:
        # The rule compares the raw frames. The encoder output is pooled and gets gradients.
        pooled = self.pool(self.encoder(frames), cu_seqlens=cu_seqlens, keys=frames)
        return self.head(pooled.values), pooled


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="threshold:0.5,max_len=8", help="rule in text form (default %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="updates (default %(default)s)")
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    voices = torch.randn(PHONES, WIDTH, generator=g)
    model = Model(arguments.rule)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(arguments.steps):
        frames, cu_seqlens, phone = make_batch(16, voices, g)
        logits, pooled = model(frames, cu_seqlens)
        middle = pooled.segments.starts + (pooled.segments.lengths - 1) // 2
        loss = nn.functional.cross_entropy(logits, phone[middle])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == arguments.steps - 1:
            right = (logits.argmax(1) == phone[middle]).float().mean().item()
            sizes = f"{len(frames)} frames, {len(logits)} tokens"
            print(f"step {step:3}  loss {loss.item():.3f}  {right:4.0%} right  {sizes}")
    return losses


if __name__ == "__main__":
    main()
