"""Every operator of the library, on one screen.

The schemas live in Python so that the ops exist, compile and export without the compiled library, which only adds
implementations. ``cu_seqlens`` [B + 1] goes with packed input ``[N, D]`` (none: one sequence), ``lengths`` [B] with
padded input ``[B, T, D]`` (none: all T); both int32 or int64. ``row_group`` is int32, a value a row. The rule is
``Rule.op_args()``.
"""

import torch

RULE = "str rule, SymInt size, float threshold, float prominence, SymInt min_len, SymInt max_len, bool keep_tail"
LAYOUT = "Tensor? cu_seqlens, Tensor? lengths"
SEGMENTS = "Tensor starts, Tensor lengths"

SCHEMAS = (
    f"adjacent_distance(Tensor x, {LAYOUT}, SymInt lag) -> Tensor",
    f"adjacent_distance_backward(Tensor grad, Tensor x, {LAYOUT}, SymInt lag) -> Tensor",
    f"select_boundaries(Tensor d, {LAYOUT}, Tensor? row_group, {RULE}, bool compact) -> (Tensor, Tensor, Tensor)",
    f"greedy_boundaries(Tensor x, {LAYOUT}, float threshold, SymInt max_len) -> Tensor",
    f"segment_reduce(Tensor x, {SEGMENTS}, str reduce) -> Tensor",
    f"segment_max_backward(Tensor grad, Tensor x, Tensor y, {SEGMENTS}) -> Tensor",
    f"segment_weighted_mean(Tensor x, Tensor weights, {SEGMENTS}) -> Tensor",
    f"segment_weighted_mean_backward(Tensor grad, Tensor x, Tensor y, Tensor weights, {SEGMENTS}) -> (Tensor, Tensor)",
    # Integrate-and-fire: `first` [M] are the weights of the first row of each token, `weights` [N] those of all others.
    f"integrate_rows(Tensor x, Tensor weights, Tensor first, Tensor? divisors, {SEGMENTS}) -> Tensor",
    f"integrate_rows_backward(Tensor grad, Tensor x, Tensor weights, Tensor first, {SEGMENTS})"
    " -> (Tensor, Tensor, Tensor)",
    f"segment_expand(Tensor y, {SEGMENTS}, SymInt num_rows, str reduce) -> Tensor",
    f"segment_pool(Tensor x, Tensor? keys, {LAYOUT}, Tensor? row_group, {RULE}, bool compact)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # Of PyTorch's own kernels on every device.
    f"nearest_odd(Tensor keys, {LAYOUT}) -> (Tensor, Tensor)",
    # Packing: row_group and audios to the rows of the packed input; see fastcompress/ops/pack.py.
    f"pack_map(Tensor row_group, Tensor? ids, {LAYOUT}, Tensor audio_cu_seqlens, SymInt num_embeddings,"
    " SymInt num_audio_rows, bool compact) -> (Tensor, Tensor, Tensor, Tensor)",
    "pack_labels(Tensor source, Tensor cu_seqlens, Tensor row_group, Tensor? labels) -> (Tensor, Tensor)",
    "pack_rows(Tensor rows, Tensor audio, Tensor index, Tensor target, bool is_table) -> Tensor",
    # Of the compiled library alone: which kernels run on the CPU, which CUDA kernels it has and what built them.
    "cpu_isa() -> str",
    "cuda_archs() -> str",
    "cuda_version() -> str",
)

LIBRARY = torch.library.Library("fastcompress", "DEF")
for _schema in SCHEMAS:
    LIBRARY.define(_schema)
