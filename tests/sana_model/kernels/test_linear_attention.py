"""Linear attention against its definition."""

import torch

from sana_model.kernels.linear_attention import relu_attention_reference, relu_linear_attention
from tests.support.peers import assert_close


def test_linear_attention_equals_the_explicit_weights():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 37, 3, 8, generator=generator) for _ in range(3))
    assert_close(relu_linear_attention(query, key, value), relu_attention_reference(query, key, value), 1e-5)


def test_linear_attention_of_a_query_without_positive_key_is_zero():
    query = -torch.ones(1, 4, 2, 8)
    attended = relu_linear_attention(query, torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8))
    assert torch.equal(attended, torch.zeros_like(attended))
