"""Attention by the kernel that was asked for."""

import logging

import pytest
import torch
from torch.nn import functional

from tests.comparing import losses
from utils.models.attention import attention_by


@pytest.mark.parametrize(
    ("backend", "expected"), [(None, "Flash"), ("flash", "Flash"), ("cudnn", "Flash"), ("math", "")]
)
def test_attention_is_by_the_kernel_that_was_asked_for(backend, expected):
    """And by another where that can't: there is no cuDNN on a CPU."""
    query = torch.randn(2, 2, 16, 8, requires_grad=True)
    with attention_by(backend):
        found = functional.scaled_dot_product_attention(query, query, query)
    assert ("Flash" in type(found.grad_fn).__name__) == bool(expected)
    with attention_by("math"):
        pass
    after = functional.scaled_dot_product_attention(query, query, query)
    assert "Flash" in type(after.grad_fn).__name__
    torch.testing.assert_close(found, after)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_training_by_another_attention(train, name, caplog):
    flags = ["--max_train_steps", 3, "--train_batch_size", 2, "--adam_epsilon", 1e-4]
    plain = train(name, *flags, out="plain")
    with caplog.at_level(logging.INFO):
        other = train(name, *flags, "--attention_backend", "math", out="other")
    assert "--attention_backend math" in caplog.text
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(other) != losses(plain)
