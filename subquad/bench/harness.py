"""A converted model for lm-eval (EleutherAI's lm-evaluation-harness), which is imported only when asked for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from subquad.checks import InputError


def lm_eval_model(model: Any, tokenizer: Any, *, batch_size: int = 1, max_length: int | None = None, **options: Any) -> Any:
    """A causal language model, swapped or not, as lm-eval's own `HFLM`.

    >>> lm = subquad.bench.lm_eval_model(model, tokenizer)
    >>> lm_eval.simple_evaluate(lm, tasks=["lambada_openai"])

    Args:
        model: a causal language model of transformers, in memory, on the device where it shall run.
        tokenizer: its own.
        batch_size: requests at once.
        max_length: tokens after which lm-eval cuts a context (default: what the model's config says). A swapped model can read more.
        options: any other argument of `HFLM`.

    Raises:
        InputError: lm-eval is not installed, or the model is not one that writes.
    """
    if find_spec("lm_eval") is None:
        raise InputError("lm_eval_model", "no package lm_eval", "it to be installed: pip install lm-eval")
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise InputError("model", type(model).__name__, "a causal language model of transformers")
    from lm_eval.models.huggingface import HFLM

    # By name lm-eval knows the kinds of model that transformers lists, which swapped ones are not.
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length, **options)
