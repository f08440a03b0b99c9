"""A conversation with a causal language model, a token at a time, whose cache lives from turn to turn.

What was said is in the cache and is not read again: with a mechanism of fixed state, memory and time per token stay the same
however long the conversation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from subquad.bench.quality import device_of
from subquad.bench.speed import cache_bytes, cached
from subquad.checks import InputError
from subquad.convert.feed import check_written


class Conversation:
    """Takes what the user says, yields the reply in pieces of text.

    Without a chat template the model goes on with the text as it stands, everything said so far before it.

    Args:
        model: swapped or not.
        tokenizer: its own; with a chat template, that is used.
        system: what the template's system message says (None: the template's own).
        temperature: 0 takes the likeliest token.
        top_p: share of the probability that is sampled from.
        most: tokens of a reply.
        seed: of the sampling.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, system: str | None = None, temperature: float = 0.7, top_p: float = 0.9, most: int = 256,
        seed: int = 0,
    ) -> None:  # fmt: skip
        if not 0 <= temperature < math.inf:
            raise InputError("temperature", temperature, "at least 0")
        if not -(2**63) <= seed < 2**63:
            raise InputError("seed", seed, "an integer of 64 bits")
        if not 0 < top_p <= 1:
            raise InputError("top_p", top_p, "more than 0, at most 1")
        if most < 1:
            raise InputError("most", most, "at least 1")
        self.model, self.tokenizer, self.system = model.eval(), tokenizer, system
        self.temperature, self.top_p, self.most = temperature, top_p, most
        self.generator = torch.Generator().manual_seed(seed)
        own = getattr(model.generation_config, "eos_token_id", None)
        self.ends = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages: list[dict[str, str]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.told = ""  # the text that the cache holds, `pending` included
        self.pending: list[int] = []  # tokens of it that the model has not read yet
        self.held: dict[str, Any] = {}  # the cache, as the argument of the model's next call
        self.read: list[int] = []  # tokens that the cache holds

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return len(self.read)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return sum(map(cache_bytes, self.held.values()))

    @property
    def templated(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def say(self, text: str) -> Iterator[str]:
        """The reply, piece by piece. It is kept as far as it was taken: a reader may stop at any piece.

        Raises:
            InputError: a text with tokens that the model has no embedding for; it is not kept.
        """
        before = self.told, self.pending, self.held, self.read
        self.messages.append({"role": "user", "content": text})
        try:
            unread = self._encode(self._unread(text))
        except InputError:
            self.told, self.pending, self.held, self.read = before
            self.messages.pop()
            raise
        self.pending += unread  # perhaps another list than before: all is read anew where a template changes what was said
        reply, shown = [], ""
        try:
            for _ in range(self.most):
                token = self._next()
                if token in self.ends:
                    break
                reply.append(token)
                self.pending = [token]
                whole = self.tokenizer.decode(reply, skip_special_tokens=True)
                if not whole.endswith("\ufffd"):  # the first bytes of a character
                    piece, shown = whole[len(shown) :], whole
                    yield piece
        finally:
            self.told += self.tokenizer.decode(reply)
            self.messages.append({"role": "assistant", "content": self.tokenizer.decode(reply, skip_special_tokens=True)})

    def _unread(self, text: str) -> str:
        """The text that the model has to read before it replies."""
        if not self.templated:
            self.told += text
            return text
        whole = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
        if not whole.startswith(self.told):  # a template that changes what was said before: all is read anew
            self.told, self.pending, self.held, self.read = "", [], {}, []
        unread, self.told = whole[len(self.told) :], whole
        return unread

    def _encode(self, text: str) -> list[int]:
        first = not self.held and not self.pending and not self.templated  # templates write the first token themselves
        ids = self.tokenizer(text, add_special_tokens=first, verbose=False)["input_ids"]
        check_written(self.tokenizer, ids, self.model)
        return ids

    @torch.no_grad()
    def _next(self) -> int:
        """Read what is pending, and choose a token."""
        if not self.pending:
            raise InputError("text", "nothing", "at least one token to read")
        ids = torch.tensor([self.pending], device=device_of(self.model))
        try:
            out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **self.held)
        except BaseException:  # some layers have taken the tokens into the cache, others have not: all is read anew
            self.pending, self.held, self.read = [*self.read, *self.pending], {}, []
            raise
        self.read += self.pending
        self.pending = []
        self.held = cached(out)
        return self._choose(out.logits[0, -1].float().cpu())

    def _choose(self, logits: torch.Tensor) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        shares, order = ((logits.double() - logits.max()) / self.temperature).softmax(-1).sort(descending=True)
        kept = shares.cumsum(-1) - shares < self.top_p  # the likeliest one always
        return int(order[torch.multinomial(shares * kept, 1, generator=self.generator)])
