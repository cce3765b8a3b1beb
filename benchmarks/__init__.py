"""Speed and memory of fastcompress against the ways one would do the same in PyTorch, and against the memory floor.

``python -m benchmarks --help`` is the one command; ``registry.py`` is the one place where a case or a contender is
added.
"""
