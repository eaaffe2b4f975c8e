"""ReLU linear attention in Triton: ReLU, sums and division without any intermediate in float32 in the GPU's memory.

The forward pass reads keys and values once for the sums, and queries once for the result. Notation, for one head: A = sum_j
ReLU(K_j)^T V_j, z = sum_j ReLU(K_j), O_i = ReLU(Q_i) A / (ReLU(Q_i) z + eps). The tokens of a head are divided among several
programs where a batch has too few heads to fill the card; their partial sums are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64  # tokens at once
ENOUGH_PROGRAMS = 512  # about four for each multiprocessor of a large card


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)  # a NaN stays, as in torch


@triton.jit
def _tile(tensor, batch, head, tokens, inside, stride_b, stride_n, stride_h, D: tl.constexpr):
    """Tokens of one head in float32: (BLOCK, D), zeros outside."""
    place = tensor + batch * stride_b + head * stride_h + tokens[:, None] * stride_n + tl.arange(0, D)[None]
    return tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _matrix(tensor, pair, D: tl.constexpr):
    """The matrix (D, D) of one head of the batch."""
    channels = tl.arange(0, D)
    return tl.load(tensor + pair * D * D + channels[:, None] * D + channels[None])


@triton.jit
def _sum_kernel(
    key, value, key_value, key_sum, num_tokens, num_heads, per_program,
    key_b, key_n, key_h, value_b, value_n, value_h,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A and z of a part of the tokens of one head."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head = pair // num_heads, pair % num_heads
    matrix, vector = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    end = tl.minimum((part + 1) * per_program, num_tokens)
    for start in range(part * per_program, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        keys = _relu(_tile(key, batch, head, tokens, tokens < end, key_b, key_n, key_h, D))
        values = _tile(value, batch, head, tokens, tokens < end, value_b, value_n, value_h, D)
        matrix += tl.dot(tl.trans(keys), values, input_precision=PRECISION)
        vector += tl.sum(keys, axis=0)
    channels, place = tl.arange(0, D), pair * tl.num_programs(1) + part
    tl.store(key_value + place * D * D + channels[:, None] * D + channels[None], matrix)
    tl.store(key_sum + place * D + channels, vector)


@triton.jit
def _attend_kernel(
    query, key_value, key_sum, output, num_tokens, num_heads, eps,
    query_b, query_n, query_h, output_b, output_n, output_h,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O of a block of queries of one head."""
    pair, tokens = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch, head, channels = pair // num_heads, pair % num_heads, tl.arange(0, D)
    inside = tokens < num_tokens
    queries = _relu(_tile(query, batch, head, tokens, inside, query_b, query_n, query_h, D))
    above = tl.dot(queries, _matrix(key_value, pair, D), input_precision=PRECISION)
    below = tl.sum(queries * tl.load(key_sum + pair * D + channels)[None], axis=1) + eps
    place = output + batch * output_b + head * output_h + tokens[:, None] * output_n + channels[None]
    tl.store(place, (above / below[:, None]).to(output.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _query_gradient_kernel(
    query, grad, key_value, key_sum, grad_query, grad_key_value, grad_key_sum, num_tokens, num_heads, per_program, eps,
    query_b, query_n, query_h, grad_b, grad_n, grad_h,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a part of one head's queries, and what they add to those of A and z."""
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, head, channels = pair // num_heads, pair % num_heads, tl.arange(0, D)
    matrix, vector = _matrix(key_value, pair, D), tl.load(key_sum + pair * D + channels)
    grad_matrix, grad_vector = tl.zeros((D, D), tl.float32), tl.zeros((D,), tl.float32)
    end = tl.minimum((part + 1) * per_program, num_tokens)
    for start in range(part * per_program, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        raw = _tile(query, batch, head, tokens, tokens < end, query_b, query_n, query_h, D)
        upstream = _tile(grad, batch, head, tokens, tokens < end, grad_b, grad_n, grad_h, D)
        queries = _relu(raw)
        above = tl.dot(queries, matrix, input_precision=PRECISION)
        below = tl.sum(queries * vector[None], axis=1) + eps
        grad_above = upstream / below[:, None]
        grad_below = -tl.sum(grad_above * above, axis=1) / below
        gradient = tl.dot(grad_above, tl.trans(matrix), input_precision=PRECISION) + grad_below[:, None] * vector[None]
        gradient = tl.where(raw <= 0, 0.0, gradient)
        place = grad_query + ((batch * num_tokens + tokens[:, None]) * num_heads + head) * D + channels[None]
        tl.store(place, gradient.to(grad_query.dtype.element_ty), mask=(tokens < end)[:, None])
        grad_matrix += tl.dot(tl.trans(queries), grad_above, input_precision=PRECISION)
        grad_vector += tl.sum(queries * grad_below[:, None], axis=0)
    place = pair * tl.num_programs(1) + part
    tl.store(grad_key_value + place * D * D + channels[:, None] * D + channels[None], grad_matrix)
    tl.store(grad_key_sum + place * D + channels, grad_vector)


@triton.jit
def _key_value_gradient_kernel(
    key, value, grad_key_value, grad_key_sum, grad_key, grad_value, num_tokens, num_heads,
    key_b, key_n, key_h, value_b, value_n, value_h,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values of one head."""
    pair, tokens = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch, head, channels = pair // num_heads, pair % num_heads, tl.arange(0, D)
    inside = tokens < num_tokens
    grad_matrix = _matrix(grad_key_value, pair, D)
    raw = _tile(key, batch, head, tokens, inside, key_b, key_n, key_h, D)
    values = _tile(value, batch, head, tokens, inside, value_b, value_n, value_h, D)
    to_keys = tl.dot(values, tl.trans(grad_matrix), input_precision=PRECISION)
    to_keys = tl.where(raw <= 0, 0.0, to_keys + tl.load(grad_key_sum + pair * D + channels)[None])
    to_values = tl.dot(_relu(raw), grad_matrix, input_precision=PRECISION)
    place = ((batch * num_tokens + tokens[:, None]) * num_heads + head) * D + channels[None]
    tl.store(grad_key + place, to_keys.to(grad_key.dtype.element_ty), mask=inside[:, None])
    tl.store(grad_value + place, to_values.to(grad_value.dtype.element_ty), mask=inside[:, None])


def fused_linear_attention(query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
    """`relu_linear_attention` of (B, N, heads, head_dim) on a CUDA device, with gradients; `head_dim` is one of HEAD_DIMS."""
    return _LinearAttention.apply(*(x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)), eps)


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, eps: float) -> Tensor:
        batch_size, num_tokens, num_heads, head_dim = query.shape
        pairs, (parts, per_program) = batch_size * num_heads, _divide(batch_size * num_heads, num_tokens)
        key_value, key_sum = _make_sums(query, pairs, parts)
        _sum_kernel[pairs, parts](
            key, value, key_value, key_sum, num_tokens, num_heads, per_program, *key.stride()[:3], *value.stride()[:3],
            D=head_dim, BLOCK=BLOCK, PRECISION="ieee" if key.dtype == torch.float32 else "tf32",  # which holds 16 bits exactly
        )  # fmt: skip
        key_value, key_sum = key_value.sum(1), key_sum.sum(1)
        output = torch.empty(query.shape, dtype=value.dtype, device=value.device)
        _attend_kernel[pairs, triton.cdiv(num_tokens, BLOCK)](
            query, key_value, key_sum, output, num_tokens, num_heads, eps, *query.stride()[:3], *output.stride()[:3],
            D=head_dim, BLOCK=BLOCK, PRECISION=_precision(query),
        )  # fmt: skip
        ctx.eps = eps
        ctx.save_for_backward(query, key, value, key_value, key_sum)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, key_value, key_sum = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        batch_size, num_tokens, num_heads, head_dim = query.shape
        pairs, (parts, per_program) = batch_size * num_heads, _divide(batch_size * num_heads, num_tokens)
        grad_query, grad_key, grad_value = (
            torch.empty(query.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
        )
        grad_key_value, grad_key_sum = _make_sums(query, pairs, parts)
        _query_gradient_kernel[pairs, parts](
            query, grad, key_value, key_sum, grad_query, grad_key_value, grad_key_sum, num_tokens, num_heads, per_program,
            ctx.eps, *query.stride()[:3], *grad.stride()[:3],
            D=head_dim, BLOCK=BLOCK, PRECISION=_precision(query),
        )  # fmt: skip
        _key_value_gradient_kernel[pairs, triton.cdiv(num_tokens, BLOCK)](
            key, value, grad_key_value.sum(1), grad_key_sum.sum(1), grad_key, grad_value, num_tokens, num_heads,
            *key.stride()[:3], *value.stride()[:3],
            D=head_dim, BLOCK=BLOCK, PRECISION=_precision(query),
        )  # fmt: skip
        return grad_query, grad_key, grad_value, None


def _divide(pairs: int, num_tokens: int) -> tuple[int, int]:
    """Into how many parts the tokens of a head are divided, and the tokens of a part, a multiple of BLOCK."""
    blocks = triton.cdiv(num_tokens, BLOCK)
    per_part = triton.cdiv(blocks, min(triton.cdiv(ENOUGH_PROGRAMS, pairs), blocks))
    return triton.cdiv(blocks, per_part), per_part * BLOCK


def _make_sums(like: Tensor, pairs: int, parts: int) -> tuple[Tensor, Tensor]:
    """Room for the parts of A and z, (pairs, parts, D, D) and (pairs, parts, D)."""
    dim = like.shape[-1]
    matrices = like.new_empty(pairs, parts, dim, dim, dtype=torch.float32)
    return matrices, like.new_empty(pairs, parts, dim, dtype=torch.float32)


def _precision(x: Tensor) -> str:
    """How products of float32 are computed: exactly, or (for inputs of 16 bits) in three passes of the tensor cores."""
    return "ieee" if x.dtype == torch.float32 else "tf32x3"
