"""Small mechanisms written under the contract, known only while a test that asks for `toys` runs, and tiny random models."""

from itertools import pairwise

import pytest
import torch
from convert.toy_mechanisms import ToyGridTemperature, ToyTemperature, tiny_llama
from torch import nn

from subquad import contract
from subquad.contract import Attention, Card, Input, register
from subquad.rotary import rotate


def zero(shape, **options):
    return 0.0


def card(**given):
    return Card(title="toy", paper="none", family="linear", summary="toy", flops=zero, bytes_moved=zero, state_bytes=zero, **given)


def segments(q, call):
    """(row of q, start, stop, row of the state) of every sequence, packed or not."""
    if call.cu_seqlens is None:
        return [(row, 0, q.shape[1], row) for row in range(q.shape[0])]
    ends = call.cu_seqlens.tolist()
    return [(0, start, stop, row) for row, (start, stop) in enumerate(pairwise(ends))]


class ToySoftmax(Attention):
    """Exact attention; its state is every key and value, padded on the right."""

    card = card(causal=True, bidirectional=True)

    def __init__(self, heads, head_dim, *, causal=True, **sizes):
        super().__init__(heads, head_dim, **sizes)
        self.causal = causal

    def mix(self, q, k, v, call):
        q, k = rotate(call.rotary, q, k)
        outputs, keys, values = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype), [], []
        for row, start, stop, kept in segments(q, call):
            kk, vv = k[row, start:stop], v[row, start:stop]
            if call.state is not None:
                past = int(call.state.length[kept])
                kk, vv = torch.cat([call.state["k"][kept, :past], kk]), torch.cat([call.state["v"][kept, :past], vv])
            keys.append(kk), values.append(vv)
            repeat = self.heads // self.kv_heads
            scores = torch.einsum("nhd,mhd->hnm", q[row, start:stop], kk.repeat_interleave(repeat, 1)) * self.head_dim**-0.5
            if self.causal:
                seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(kk.shape[0] - (stop - start))
                scores = scores.masked_fill(~seen, float("-inf"))
            o = torch.einsum("hnm,mhv->nhv", scores.softmax(-1), vv.repeat_interleave(repeat, 1))
            outputs = outputs.index_put((torch.tensor(row), torch.arange(start, stop)), o)
        return outputs, {name: nn.utils.rnn.pad_sequence(x, batch_first=True) for name, x in (("k", keys), ("v", values))}


class ToyLinear(Attention):
    """Causal linear attention with a gate on the values, projected from the hidden states, and a constant per head."""

    card = card(
        causal=True, recurrent=True, inputs={"gate": Input("gate of each value", ("B", "N", "Hs"), 0.0, 1.0)}
    )  # fmt: skip

    def __init__(self, heads, head_dim, *, bias=1.0, **sizes):
        super().__init__(heads, head_dim, **sizes)
        self.bias = bias
        self.gate = nn.Linear(self.hidden_size, self.kv_heads)
        nn.init.constant_(self.gate.bias, bias)
        self.register_buffer("constant", torch.linspace(0.3, 0.9, self.heads), persistent=False)

    def project(self, hidden):
        return {"gate": self.gate(hidden).sigmoid()}

    def mix(self, q, k, v, call, gate):
        q, k = rotate(call.rotary, q, k)
        repeat = self.heads // self.kv_heads
        q, k = nn.functional.elu(q) + 1, (nn.functional.elu(k) + 1).repeat_interleave(repeat, 2)
        v = (v * gate[..., None]).repeat_interleave(repeat, 2) * self.constant[:, None].to(v.dtype)
        outputs, states = torch.zeros_like(v), []
        for row, start, stop, kept in segments(q, call):
            before = call.state["kv"][kept] if call.state is not None else q.new_zeros(self.heads, self.head_dim, self.value_dim)
            sums = torch.einsum("nhd,nhv->nhdv", k[row, start:stop], v[row, start:stop]).cumsum(0) + before
            o = torch.einsum("nhd,nhdv->nhv", q[row, start:stop], sums)
            outputs = outputs.index_put((torch.tensor(row), torch.arange(start, stop)), o)
            states.append(sums[-1] if stop > start else before)
        return outputs, {"kv": torch.stack(states)}


class ToyRows(Attention):
    """Each token gets the mean value of its row of the grid."""

    card = card(bidirectional=True, needs_grid=True)

    def mix(self, q, k, v, call):
        on_grid = v.unflatten(1, call.grid)
        return on_grid.mean(2, keepdim=True).expand_as(on_grid).flatten(1, 2), None


class ToyCausalOnly(ToySoftmax):
    """Causal, and nothing else."""

    card = card(causal=True)


LEARNERS = {"toy-temperature": ToyTemperature, "toy-grid-temperature": ToyGridTemperature}
TOYS = {"toy-softmax": ToySoftmax, "toy-linear": ToyLinear, "toy-rows": ToyRows, "toy-causal-only": ToyCausalOnly}


def known(classes):
    for name, cls in classes.items():
        register(name)(cls)
    yield
    for name in classes:
        del contract._REGISTRY[name]


@pytest.fixture
def toys():
    yield from known(TOYS)


@pytest.fixture
def learners():
    """Mechanisms that can learn to be exactly softmax attention."""
    yield from known(LEARNERS)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_llama()


@pytest.fixture
def tokens():
    return torch.randint(97, (600,), generator=torch.Generator().manual_seed(5))


SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.3,
}  # fmt: skip
FAMILIES = {
    "llama": {
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "attention_bias": True},
}  # fmt: skip


@pytest.fixture
def decoder():
    """Make a tiny random decoder: decoder("llama", option=…)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family="llama", **changes):
        config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family], **changes})
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a dropped norm or bias
                nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
        return model

    return make
