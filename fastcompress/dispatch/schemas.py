"""Schemas of all ops of the library.

They are defined in Python, so that the ops exist, compile and export without the compiled library, which only adds
kernels. Arguments that several ops share:

* ``cu_seqlens``: [B + 1] int32 or int64, for packed input ``[N, D]``; ``None`` means one sequence.
* ``lengths``: [B] int32 or int64, for padded input ``[B, T, D]``; ``None`` means no padding.
* ``row_group``: int32, one value per row.
* The arguments of the rule: those of ``Rule.op_args()``.
"""

import torch

RULE = "str rule, SymInt size, float threshold, float prominence, SymInt min_len, SymInt max_len, bool keep_tail"
LAYOUT = "Tensor? cu_seqlens, Tensor? lengths"
SEGMENTS = "Tensor starts, Tensor lengths"

SCHEMAS = (
    f"adjacent_distance(Tensor x, {LAYOUT}, SymInt lag) -> Tensor",
    f"adjacent_distance_backward(Tensor grad, Tensor x, {LAYOUT}, SymInt lag) -> Tensor",
    f"banded_distance(Tensor x, {LAYOUT}, SymInt window) -> Tensor",
    f"select_boundaries(Tensor d, {LAYOUT}, Tensor? row_group, {RULE}, bool compact) -> (Tensor, Tensor, Tensor)",
    f"min_variance_boundaries(Tensor d, {LAYOUT}, Tensor? row_group, float rate, SymInt max_len) -> Tensor",
    f"greedy_boundaries(Tensor x, {LAYOUT}, float threshold, SymInt max_len) -> Tensor",
    f"segment_reduce(Tensor x, {SEGMENTS}, str reduce) -> Tensor",
    f"segment_max_backward(Tensor grad, Tensor x, Tensor y, {SEGMENTS}) -> Tensor",
    f"segment_weighted_mean(Tensor x, Tensor weights, {SEGMENTS}) -> Tensor",
    f"segment_weighted_mean_backward(Tensor grad, Tensor x, Tensor y, Tensor weights, {SEGMENTS}) -> (Tensor, Tensor)",
    # Integrate-and-fire: `first` [M] has the weight of the first row of each token, `weights` [N] those of other rows.
    f"integrate_rows(Tensor x, Tensor weights, Tensor first, Tensor? divisors, {SEGMENTS}) -> Tensor",
    f"integrate_rows_backward(Tensor grad, Tensor x, Tensor weights, Tensor first, {SEGMENTS})"
    " -> (Tensor, Tensor, Tensor)",
    f"segment_expand(Tensor y, {SEGMENTS}, SymInt num_rows, str reduce) -> Tensor",
    f"segment_pool(Tensor x, Tensor? keys, {LAYOUT}, Tensor? row_group, {RULE}, bool compact)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    # Implemented with PyTorch's own kernels on every device.
    f"nearest_odd(Tensor keys, {LAYOUT}) -> (Tensor, Tensor)",
    f"iterative_fusion(Tensor x, Tensor? weights, {LAYOUT}, SymInt count) -> (Tensor, Tensor, Tensor, Tensor)",
    f"iterative_fusion_backward(Tensor grad, Tensor grad_sizes, Tensor x, Tensor? weights, {LAYOUT}, SymInt count)"
    " -> (Tensor, Tensor)",
    # Packing; see fastcompress/ops/pack.py.
    f"pack_map(Tensor row_group, Tensor? ids, {LAYOUT}, Tensor audio_cu_seqlens, SymInt num_embeddings,"
    " SymInt num_audio_rows, bool compact) -> (Tensor, Tensor, Tensor, Tensor)",
    "pack_labels(Tensor source, Tensor cu_seqlens, Tensor row_group, Tensor? labels) -> (Tensor, Tensor)",
    "pack_rows(Tensor rows, Tensor audio, Tensor index, Tensor target, bool is_table) -> Tensor",
    # Information about the compiled library, which alone implements them: instruction set of the CPU kernels,
    # architectures of the CUDA kernels, and version of the CUDA toolkit.
    "cpu_isa() -> str",
    "cuda_archs() -> str",
    "cuda_version() -> str",
)

LIBRARY = torch.library.Library("fastcompress", "DEF")
for _schema in SCHEMAS:
    LIBRARY.define(_schema)
