"""Results: text forms of one line, lengths, masks and padded forms."""

from __future__ import annotations

import pytest
import torch

import fastcompress as fc
from tests.support.sample_inputs import assert_same_bits

X, CU = torch.arange(22.0).view(11, 2), torch.tensor([0, 5, 5, 11])
POOLED = fc.segment_pool(X, "uniform:2", cu_seqlens=CU)


def test_text_forms():
    packed = fc.pack(torch.tensor([[5, 9, 7]]), torch.ones(10, 4), torch.ones(3, 4), placeholder=9)
    labelled = fc.pack(torch.tensor([[5], [7]]), torch.ones(10, 4).bfloat16(), labels=torch.tensor([[1], [2]]))
    cases = {
        POOLED: "Pooled(6 tokens of 3 sequences, width 2, float32)",
        POOLED.segments: "Segments(6 segments of 11 rows in 3 sequences)",
        fc.segment_pool(X[:1].double(), "uniform:2"): "Pooled(1 token of 1 sequence, width 2, float64)",
        fc.integrate_and_fire(X, torch.full((11,), 0.5)): "Fired(6 tokens of 1 sequence, width 2, float32)",
        fc.bipartite_merge(X, 1.0): "Merged(11 tokens of 1 sequence, width 2, float32)",
        packed: "PackedInputs(5 rows of 1 sample, width 4, float32)",
        labelled: "PackedInputs(2 rows of 2 samples, width 4, bfloat16, with labels)",
        fc.StreamingSegmentPool("uniform:2")(X): "Streamed(5 tokens, width 2, float32)",
    }
    for result, text in cases.items():
        assert repr(result) == str(result) == text


def test_text_forms_read_no_values():
    with torch.device("meta"):
        values, offsets = torch.empty(6, 2), torch.empty(4, dtype=torch.int32)
        starts = torch.empty(6, dtype=torch.int64)
    segments = fc.Segments(starts, starts, offsets, offsets, 11)
    assert repr(fc.Pooled(values, segments)) == "Pooled(6 tokens of 3 sequences, width 2, float32, meta)"
    assert repr(segments) == "Segments(6 segments of 11 rows in 3 sequences, meta)"


def test_lengths_and_masks():
    assert len(POOLED) == 6 and POOLED.max_seqlen == 3
    mask = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()
    assert torch.equal(POOLED.mask, mask)
    values, counts = POOLED.to_padded()
    assert counts.tolist() == [3, 0, 3] and counts.dtype == torch.int32
    again, found = POOLED.to_padded(return_mask=True)
    assert torch.equal(found, mask)
    assert_same_bits(again, values)
    assert_same_bits(values[mask], POOLED.values)
    assert not values[~mask].any()
    # A padded result is padded input again.
    assert_same_bits(fc.segment_pool(values, "uniform:1", attention_mask=found).values, POOLED.values)


@pytest.mark.parametrize("compact", [True, False])
def test_results_without_tokens(compact: bool):
    pooled = fc.segment_pool(torch.zeros(0, 3), "uniform:2", cu_seqlens=torch.tensor([0]), compact=compact)
    assert pooled.max_seqlen == 0 and pooled.mask.shape == (0, 0)
    assert pooled.to_padded(return_mask=True)[0].shape == (0, 0, 3)
    empty = fc.segment_pool(torch.zeros(2, 4, 3), "uniform:2", lengths=torch.tensor([0, 0]), compact=compact)
    assert empty.max_seqlen == 0 and empty.mask.shape == (2, 0)
    assert len(empty) == (0 if compact else 6)


def test_the_rule_is_the_second_argument():
    assert_same_bits(fc.segment_pool(X, "uniform:3").values, fc.segment_pool(X, rule=fc.Uniform(3)).values)
    assert_same_bits(fc.segment_pool(X, fc.Threshold(0.5)).values, fc.segment_pool(X, rule="threshold:0.5").values)
    with pytest.raises(TypeError, match="positional argument"):
        fc.segment_pool(X, "uniform:3", CU)


def test_the_module_names_its_arguments():
    pool, y = fc.nn.SegmentPool("label-change"), X[:10].view(2, 5, 2)
    labels = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    expected = fc.segment_pool(y, "label-change", labels=labels, lengths=torch.tensor([5, 3]))
    assert_same_bits(pool(y, labels=labels, lengths=torch.tensor([5, 3])).values, expected.values)
    assert_same_bits(fc.nn.SegmentPool("uniform:2")(X, CU).values, POOLED.values)
    with pytest.raises(TypeError, match="unexpected keyword argument 'length'"):
        pool(y, length=torch.tensor([5, 3]))
