"""What a change of attention does to sentence embeddings: cosine to the original's, and whether similarities keep their order.

e = Σ_t h_t / ‖Σ_t h_t‖  over real tokens            the embedding of all-MiniLM and its kin
cosine   = mean over sentences of e · e′
spearman = correlation of the ranks of e_i · e_j and of e′_i · e′_j, over all pairs i < j
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from subquad.bench.progress import bar
from subquad.bench.quality import device_of, evaluating
from subquad.checks import InputError, shape_of


@dataclass(frozen=True)
class Fidelity:
    """Mean and least cosine to the original's embeddings, and Spearman's correlation of pairwise similarities."""

    cosine: float
    least: float
    spearman: float
    sentences: int


def tokenized(tokenizer: Any, sentences: Sequence[str], *, batch: int = 32, length: int = 128) -> list[dict[str, Tensor]]:
    """Batches of the model's arguments, padded to their longest sentence; sentences end after `length` tokens."""
    batches = []
    for start in range(0, len(sentences), batch):
        made = tokenizer(list(sentences[start : start + batch]), padding=True, truncation=True, max_length=length, return_tensors="pt")
        batches.append({key: made[key] for key in ("input_ids", "attention_mask")})
    return batches


@torch.no_grad()
def embed(model: Any, tokenizer: Any, sentences: Sequence[str], *, batch: int = 32, length: int = 128, progress: bool = False) -> Tensor:
    """Embeddings ``[sentences, width]`` of unit length, on the CPU, in float32 or wider: the mean over real tokens."""
    if not sentences:
        raise InputError("sentences", "none", "at least one")
    device, found = device_of(model), []
    batches = tokenized(tokenizer, sentences, batch=batch, length=length)
    with evaluating(model), bar("embed", len(batches), show=progress) as advance:
        for one in batches:
            one = {key: x.to(device) for key, x in one.items()}
            hidden = model(**one).last_hidden_state
            hidden = hidden if hidden.dtype == torch.float64 else hidden.float()
            found.append(F.normalize((hidden * one["attention_mask"][..., None]).sum(1), dim=-1).cpu())
            advance()
    return torch.cat(found)


def fidelity(embeddings: Tensor, original: Tensor) -> Fidelity:
    """How well embeddings ``[n, C]`` stand for the original's, both of unit length, of the same at least 3 sentences."""
    if embeddings.shape != original.shape or len(original) < 3:
        raise InputError("embeddings", shape_of(embeddings), f"{shape_of(original)}, as the original's, of at least 3 sentences")
    cosines = (embeddings.double() * original.double()).sum(-1)
    order = spearman(pairwise(embeddings), pairwise(original))
    return Fidelity(float(cosines.mean()), float(cosines.min()), order, len(original))


def pairwise(embeddings: Tensor) -> Tensor:
    """e_i · e_j of all pairs i < j."""
    e = embeddings.double()
    i, j = torch.triu_indices(len(e), len(e), 1)
    return (e @ e.T)[i, j]


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; ties share their mean rank."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, group, counts = x.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[group]
