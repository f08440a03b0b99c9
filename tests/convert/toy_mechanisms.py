"""Mechanisms that can learn to be exactly softmax attention, so that the end of a distillation is known."""

from itertools import pairwise

import torch
from torch import nn

from subquad.contract import Attention, Card
from subquad.rotary import rotate


def zero(shape, **options):
    return 0.0


def card(**given):
    return Card(title="toy", paper="none", family="exact", summary="toy", flops=zero, bytes_moved=zero, state_bytes=zero, **given)


class ToyTemperature(Attention):
    """softmax(exp(t_h) q·k/√D) with learnt t_h, zero being softmax; starts at `start`, and `noise` is dropped out of v."""

    card = card(causal=True, bidirectional=True)

    def __init__(self, heads, head_dim, *, start=-1.0, noise=0.0, causal=True, **sizes):
        super().__init__(heads, head_dim, **sizes)
        self.start, self.noise, self.causal = start, noise, causal
        self.temperature = nn.Parameter(torch.full((heads,), start))

    def mix(self, q, k, v, call):
        q, k = rotate(call.rotary, q, k)
        v = nn.functional.dropout(v, self.noise, self.training)
        repeat = self.heads // k.shape[2]
        q, k, v = q * self.temperature.exp()[:, None].to(q.dtype), k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
        ends = [0, q.shape[1]] if call.cu_seqlens is None else call.cu_seqlens.tolist()
        parts = [
            nn.functional.scaled_dot_product_attention(*(x[:, a:b].transpose(1, 2) for x in (q, k, v)), is_causal=self.causal)
            for a, b in pairwise(ends)
        ]
        return torch.cat(parts, 2).transpose(1, 2), None


class ToyGridTemperature(ToyTemperature):
    """The same, for a grid that it checks."""

    card = card(bidirectional=True, needs_grid=True)

    def mix(self, q, k, v, call):
        assert call.grid[0] * call.grid[1] == q.shape[1]
        return super().mix(q, k, v, call)


def tiny_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
