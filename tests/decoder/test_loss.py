"""The loss of packed rows: its precision, its divisor, and parameters that a batch does not use."""

from __future__ import annotations

import pytest
import torch

from fastcompress.decoder.loss import batch_share, label_rows, next_token_loss, zero_of


def test_a_row_predicts_the_label_of_the_next_row():
    labels = torch.tensor([-100, -100, 7, 8, -100, -100, 3])
    assert label_rows(labels).tolist() == [1, 2, 5]
    assert label_rows(torch.full((3,), -100)).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fp64_stays_and_half_types_are_computed_in_fp32(dtype: torch.dtype):
    logits, labels = torch.randn(40, 11, dtype=dtype), torch.randint(0, 11, (41,))
    labels[0] = -100
    loss = next_token_loss(logits, labels, label_rows(labels))
    exact = -logits.double().log_softmax(-1).gather(1, labels[1:, None]).mean()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-14 if dtype == torch.float64 else 1e-6, atol=0)


def test_batches_of_a_step_add_up_to_the_loss_of_the_step():
    logits, labels = torch.randn(9, 5, dtype=torch.float64), torch.tensor([-100, 1, 2, 3, 4, 0, 1, 2, 3, 4])
    whole = next_token_loss(logits, labels, label_rows(labels))
    first, second = labels[:4], torch.cat([labels[:1], labels[4:]])
    parts = [
        next_token_loss(logits[:3], first, label_rows(first), 9),
        next_token_loss(logits[3:], second, label_rows(second), torch.tensor(9)),
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert batch_share(3, 9) + batch_share(6, 9) == 1.0 and batch_share(3, None) == 1.0


def test_a_batch_without_labels_has_loss_0():
    logits, labels = torch.randn(0, 5, requires_grad=True), torch.full((4,), -100)
    loss = next_token_loss(logits, labels, label_rows(labels))
    loss.backward()
    assert loss == 0 and logits.grad is not None


def test_unused_parameters_get_gradients_of_zero():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    frozen = torch.nn.Parameter(torch.full((2,), torch.nan), requires_grad=False)
    loss = used.sum() + zero_of([unused, frozen], used.device)
    loss.backward()
    assert loss == 2 and unused.grad is not None and not unused.grad.any() and frozen.grad is None
