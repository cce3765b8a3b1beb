"""Time and memory of fastcompress against baselines in PyTorch, and against the bandwidth bound.

``python -m benchmarks --help`` describes the command. ``registry.py`` lists the suites, ``suites/`` defines what is
measured and ``harness/`` how; ``results.py`` is what is written.
"""
