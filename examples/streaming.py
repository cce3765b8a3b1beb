"""Pool frames that arrive in chunks. Each token is returned as soon as it is final.

The tokens are bit-equal to those of one call on all frames.

python examples/streaming.py
python examples/streaming.py --rule uniform:3 --chunk 1
"""

from __future__ import annotations

import argparse

import torch

import fastcompress as fc


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", default="local-max", help="compression rule in text form (default %(default)s)")
    parser.add_argument("--chunk", type=int, default=10, help="frames per chunk (default %(default)s)")
    arguments = parser.parse_args(argv)

    frames = torch.randn(100, 64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    pool = fc.StreamingSegmentPool(arguments.rule)
    found, seen = [], 0
    for chunk in frames.split(arguments.chunk):
        tokens = pool(chunk)
        found.append(tokens)
        seen += len(chunk)
        print(f"{seen:4} frames: {len(tokens.values)} tokens are final, {pool.pending} frames are pending")
    found.append(pool.flush())
    print(f"   the end: {len(found[-1].values)} more")

    streamed = torch.cat([tokens.values for tokens in found])
    whole = fc.segment_pool(frames, rule=arguments.rule)
    assert torch.equal(streamed, whole.values)
    assert torch.equal(torch.cat([tokens.starts for tokens in found]), whole.segments.starts)
    print(f"{len(streamed)} tokens, bit-equal to pooling all {len(frames)} frames at once")
    return len(streamed)


if __name__ == "__main__":
    main()
