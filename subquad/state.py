"""State: what a causal mechanism keeps of the past, and how it is reordered, measured and rolled back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from subquad.checks import InputError, shape_of

RECORD_TOKENS = 64  # how far back `crop` reaches at the least, while recording
SNAPSHOT_EVERY = 16  # tokens between snapshots: bounds both the snapshots kept and the tokens replayed


@dataclass(frozen=True)
class Step:
    """A recorded call: the state before it, and the inputs (each `[B, N, …]`) that led to the next state."""

    before: State
    inputs: dict[str, Tensor]
    replay: Callable[[State, dict[str, Tensor]], State]

    @property
    def tokens(self) -> int:
        return next(iter(self.inputs.values())).shape[1]


class State:
    """Named batch-first tensors and the number of real tokens seen by each row.

    A call returns a new state and leaves the old one as it was.

    Args:
        tensors: each ``[B, …]``.
        length: ``[B]`` int64, tokens seen by each row.
        origin: the mechanism and sizes it belongs to, in words; others refuse it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], length: Tensor, origin: str = "") -> None:
        self.tensors = dict(tensors)
        self.length, self.origin = length, origin
        self.recording = False
        self.steps: tuple[Step, ...] = ()
        for name, x in self.tensors.items():
            if x.shape[0] != length.shape[0]:
                raise InputError(f"state.{name}", shape_of(x), f"batch size {length.shape[0]}")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise InputError("state", f"one of {', '.join(self.tensors) or 'no tensors'}", f"a state of this mechanism, with {name}")
        return self.tensors[name]

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={list(x.shape)}" for name, x in self.tensors.items())
        return f"{type(self).__name__}({inside}, length={self.length.tolist()})"

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the kept tensors (a recording's snapshots are not counted: they are bounded and temporary)."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())

    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """The same state with `change` applied to every batch-first tensor, the recording included."""
        new = type(self)({name: change(x) for name, x in self.tensors.items()}, change(self.length), self.origin)
        new.recording = self.recording
        new.steps = tuple(replace(s, before=s.before.map(change), inputs={n: change(x) for n, x in s.inputs.items()}) for s in self.steps)
        return new

    def reorder(self, index: Tensor) -> State:
        """Rows `index` ``[B']`` of the batch, repeats allowed (beam search, batch selection)."""
        return self.map(lambda x: x.index_select(0, index.to(x.device)))

    def detach(self) -> State:
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> State:
        return self.map(lambda x: x.to(device))

    def assign(self, other: State) -> State:
        """Write another state's tensors, of the same names and shapes, into this one's, which stay where they are; returns self."""
        mine, given = ({**state.tensors, "length": state.length} for state in (self, other))
        forms = [{name: x.shape for name, x in tensors.items()} for tensors in (mine, given)]
        if forms[0] != forms[1]:
            raise InputError("other", repr(other), f"the names and shapes of {self!r}")
        places = {x.untyped_storage().data_ptr() for x in mine.values()}
        new = {name: x.clone() if x.untyped_storage().data_ptr() in places and x is not mine[name] else x for name, x in given.items()}
        for name, x in new.items():
            if x is not mine[name]:
                mine[name].copy_(x)
        return self

    def record(self, on: bool = True) -> State:
        """Start (or stop) keeping what `crop` needs; in place, returns self."""
        self.recording = on
        if not on:
            self.steps = ()
        return self

    def recorded(self, after: State, inputs: dict[str, Tensor], replay: Callable[[State, dict[str, Tensor]], State]) -> State:
        """`after`, the state that `inputs` led to from here, with this state's recording carried on; in place."""
        after.recording = self.recording
        if not self.recording:
            return after
        before = type(self)(self.tensors, self.length, self.origin)
        steps = self.steps
        last = steps[-1] if steps else None
        joined = next(iter(inputs.values())).shape[1] + (last.tokens if last else 0)
        if last is not None and joined <= SNAPSHOT_EVERY and last.inputs.keys() == inputs.keys():
            both = {name: torch.cat([last.inputs[name], x], 1) for name, x in inputs.items()}
            steps = (*steps[:-1], replace(last, inputs=both))
        else:
            steps = (*steps, Step(before, inputs, replay))
        while len(steps) > 1 and sum(s.tokens for s in steps[1:]) >= RECORD_TOKENS:
            steps = steps[1:]
        after.steps = steps
        return after

    def crop(self, n: int) -> State:
        """The state after each row's first `n` tokens or, for negative `n`, without each row's last ``-n``.

        Restores the nearest snapshot and replays the inputs since; these are kept only while recording.

        Raises:
            InputError: rows differ in length and n ≥ 0, or n lies further back than what was recorded.
        """
        drop = -n
        if n >= 0:
            lengths = self.length.tolist()
            if len(set(lengths)) > 1:
                raise InputError("n", n, f"a negative number (rows differ in length: {lengths})")
            drop = (lengths[0] if lengths else n) - n
        if drop == 0:
            return self
        reach = sum(s.tokens for s in self.steps)
        if drop < 0 or drop > reach:
            raise InputError("n", n, f"to go back at most the {reach} tokens recorded (recording is {'on' if self.recording else 'off'})")
        steps = list(self.steps)
        while drop >= steps[-1].tokens and len(steps) > 1:
            drop -= steps.pop().tokens
        last = steps[-1]
        keep = last.tokens - drop
        inputs = {name: x[:, :keep] for name, x in last.inputs.items()}
        if keep:
            state = last.replay(last.before, inputs)
            state.steps = (*steps[:-1], replace(last, inputs=inputs))
        else:
            state = type(last.before)(last.before.tensors, last.before.length, last.before.origin)
            state.steps = tuple(steps[:-1])
        state.recording = self.recording
        return state

    @staticmethod
    def join(states: list[State]) -> State:
        """One batch of the rows of several states (recordings are dropped).

        Tensors that grow with the tokens grow along dim 1 and end with the last token: shorter ones are filled up in front.
        """
        first, tensors = states[0], {}
        for name in first.tensors:
            parts = [s.tensors[name] for s in states]
            longest = max((x.shape[1] for x in parts if x.dim() > 1), default=0)
            tensors[name] = torch.cat([x if x.dim() < 2 or x.shape[1] == longest else _fill(x, longest) for x in parts])
        return type(first)(tensors, torch.cat([s.length for s in states]), first.origin)


def _fill(x: Tensor, tokens: int) -> Tensor:
    """Zeros in front of dim 1, up to `tokens`."""
    return torch.cat([x.new_zeros(x.shape[0], tokens - x.shape[1], *x.shape[2:]), x], 1)
