"""Launches of the moments' kernels: sizes, heads and constants are worked out once for each kind of call."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.ops.common import cdiv, padded
from subquad.ops.launch import INTERPRETED, bits_of, processors, remembered
from subquad.ops.launcher import Grid, Launcher, launcher, token_step
from subquad.ops.moments import backward, blocks, kernels
from subquad.ops.moments.moments import KERNEL_MAPS, TWO_SIGNS
from subquad.ops.moments.rows import row, runs

MAPS = {name: getattr(blocks, name.upper()).value for name in KERNEL_MAPS}
NORMALS = {name: getattr(blocks, name.upper()).value for name in ("divide", "floored", "magnitude", "subtract", "none")}
BLOCK = 1024  # numbers of a record that one program combines


class How(NamedTuple):
    """What an operator is told besides its tensors.

    averaged: the global query is the mean of φ(q). mean: sums are divided by the weight. halves: the channels that turn in pairs
    (i, i + halves/2), 0 if pairs are adjacent. eps: with "floored" the floor.
    """

    q_map: str = "identity"
    k_map: str = "identity"
    averaged: bool = False
    logit_scale: float = 1.0
    normalizer: str = "none"
    mean: bool = True
    scale: float = 1.0
    eps: float = 0.0
    halves: int = 0


class Tensors(NamedTuple):
    """All that an operator reads; cos and sin ``[1 or B, N, D/2]``, seen as bytes, query ``[rows, heads, F]``."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    record: Tensor | None = None
    query: Tensor | None = None
    logits: Tensor | None = None
    factors: Tensor | None = None
    seen: Tensor | None = None
    k_cos: Tensor | None = None
    k_sin: Tensor | None = None
    q_cos: Tensor | None = None
    q_sin: Tensor | None = None
    cu: Tensor | None = None


class Sizes(NamedTuple):
    """Widths of keys, values, features and a record, and the place of the weight in it."""

    D: int
    V: int
    F: int
    L: int
    END: int

    @classmethod
    def of(cls, width: int, values: int, two_signs: bool) -> Sizes:
        features = 2 * width if two_signs else width
        end = features * values + features + values
        return cls(width, values, features, cdiv(end + 2, 16) * 16, end)


class Launch(NamedTuple):
    """A kernel ready to run, and into how many runs it cuts each row and head."""

    run: Launcher
    grid: Grid
    strides: tuple[int, ...]
    plain: tuple[Any, ...]
    runs: int

    def __call__(self, *tensors: Tensor) -> None:
        self.run(self.grid, tensors, self.strides, self.plain)


Kind = tuple[torch.Size, tuple[int, ...], torch.dtype] | None  # of a tensor: shape, strides, dtype


def head_count(x: Tensors, how: How) -> int:
    """Heads of the record: the largest count of what it is made of."""
    if x.k is None:
        assert x.record is not None
        return x.record.shape[1]
    counts = [t.shape[2] for t in (x.k, x.v, x.logits, x.factors) if t is not None]
    counts += [] if x.query is None else [x.query.shape[1]]
    return max(counts + ([x.q.shape[2]] if how.averaged and x.q is not None else []))


def plan(x: Tensors, do: Tensor | None, values: int, how: How) -> Plan:
    """The plan for tensors like these; `do` is o's gradient."""
    like = x.q if x.k is None else x.k
    assert like is not None
    kinds = tuple([None if t is None else (t.shape, t.stride(), t.dtype) for t in (*x, do)])
    return _plan(kinds, head_count(x, how), values, how, like.device)


@remembered
def _plan(kinds: tuple[Kind, ...], heads: int, values: int, how: How, device: torch.device) -> Plan:
    return Plan(dict(zip((*Tensors._fields, "do"), kinds)), heads, values, how, device)


class Plan:
    """Heads, sizes and launches of one kind of call."""

    def __init__(self, kinds: dict[str, Kind], key_heads: int, values: int, how: How, device: torch.device) -> None:
        self.kinds, self.how, self.device = kinds, how, device
        shapes = {name: None if kind is None else kind[0] for name, kind in kinds.items()}
        q, k, cu = shapes["q"], shapes["k"], shapes["cu"]
        like = kinds["q"] if k is None else kinds["k"]
        assert like is not None
        (self.batch, self.tokens, _, width), _, self.dtype = like
        self.q_tokens = self.tokens if q is None else q[1]
        self.key_heads = key_heads
        self.q_heads = 0 if q is None else q[2]
        self.heads = max(self.key_heads, self.q_heads)
        self.size = Sizes.of(width, values, (how.q_map if k is None else how.k_map) in TWO_SIGNS)
        self.rows = self.batch if cu is None else cu[0] - 1
        self.row_tokens = self.tokens if cu is None else cdiv(self.tokens, max(1, self.rows))
        self.same = {
            "D": width, "BD": padded(width), "HALVES": how.halves, "TWO": width < self.size.F, "PACKED": cu is not None,
        }  # fmt: skip
        wide = INTERPRETED or self.dtype != torch.bfloat16
        centred = how.normalizer in ("magnitude", "subtract") or q is None  # Σ w v is read, or given to the caller
        turned = kinds["q_cos"] is not None or kinds["k_cos"] is not None
        self.total = {"TOTAL": centred}
        # where nothing turns, a mean over tokens cancels in the gradients; few channels average rounding less; wide ones lack the room
        self.split = {"SPLIT": not wide and width <= 64 and (not turned or width <= 32)}
        self.both = {"V": values, "BV": padded(values), "L": self.size.L, "WIDE": wide, "IP": "tf32x3" if wide else "tf32", **self.same}

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    # ---- each kernel's constants -----------------------------------------------------------------------------------

    def _launch(
        self, kernel: Any, name: str, heads: int, constants: dict[str, Any], strides: tuple[int, ...], tokens: int, *plain: Any
    ) -> Launch:  # fmt: skip
        """`plain` is what follows the tokens and runs among the kernel's plain numbers."""
        turned, signs = bool(constants.get("TURN")), self.same["TWO"]
        way = ("signs, turned" if turned else "signs") if signs else "turned" if turned else "none"
        tile = row(name, way, max(padded(self.size.F), padded(self.size.V)), bits_of(self.dtype))
        each = max(1, self.rows * heads)
        count = max(1, min(runs(name, each, processors(self.device)), cdiv(self.row_tokens, 2 * tile.columns)))
        run = launcher(kernel, C=tile.columns, num_warps=tile.warps, num_stages=tile.stages, **constants)
        return Launch(run, (self.rows * heads * count, 1, 1), strides, (tokens, count, *plain), count)

    def _strides(self, name: str, dims: int = 3) -> tuple[int, ...]:
        kind = self.kinds[name]
        return (0,) * dims if kind is None else kind[1][:dims]

    def _across(self, *names: str) -> tuple[int, ...]:
        """From one batch row to the next, and from one head to the next; `_steps` has those between tokens, which are compiled in."""
        return tuple(stride for name in names for stride in self._strides(name)[::2])

    def _steps(self, *names: str) -> dict[str, int]:
        kinds = {name: self.kinds[name] for name in names}
        return {f"s{name[0]}_n": 0 if kind is None else token_step(*kind[:2]) for name, kind in kinds.items()}

    def _row_stride(self, name: str) -> tuple[int, ...]:
        """From one batch row's angles to the next's; 0 where all rows share them."""
        kind = self.kinds[name]
        return (0,) if kind is None or kind[0][0] == 1 else (kind[1][0],)

    @cached_property
    def mean_launch(self) -> Launch:
        constants = {"H": self.q_heads, "MAP": MAPS[self.how.q_map], **self._steps("q"), **self.same}
        return self._launch(kernels.mean_kernel, "mean", self.q_heads, constants, self._across("q"), self.q_tokens)

    def _key_launch(self, kernel: Any, name: str, **more: bool) -> Launch:
        kinds, heads = self.kinds, self.key_heads

        def group(name: str, dim: int = 2) -> int:
            kind = kinds[name]
            return 1 if kind is None else heads // kind[0][dim]

        query = kinds["query"] is not None or self.how.averaged
        constants = {
            "H": heads, "GK": group("k"), "GV": group("v"), "GL": group("logits"), "GF": group("factors"),
            "GG": heads // self.q_heads if self.how.averaged else group("query", 1),
            "MAP": MAPS[self.how.k_map], "TURN": kinds["k_cos"] is not None, "QUERY": query, "LOGITS": kinds["logits"] is not None,
            "FACTORS": kinds["factors"] is not None, "MASK": kinds["seen"] is not None, **self._steps("k", "v"), **self.total, **self.both,
            **more,
        }  # fmt: skip
        strides = (
            *self._across("k", "v"), *self._strides("logits"), *self._strides("factors"), *self._strides("seen", 2),
            *self._row_stride("k_cos"),
        )  # fmt: skip
        return self._launch(kernel, name, heads, constants, strides, self.tokens, self.how.logit_scale)

    @cached_property
    def gather_launch(self) -> Launch:
        return self._key_launch(kernels.gather_kernel, "gather")

    @cached_property
    def gather_back_launch(self) -> Launch:
        return self._key_launch(backward.gather_back_kernel, "gather_back", **self.split)

    def _query_constants(self) -> dict[str, Any]:
        return {
            "H": self.heads, "GQ": self.heads // self.q_heads, "GM": self.heads // self.key_heads, "MAP": MAPS[self.how.q_map],
            "TURN": self.kinds["q_cos"] is not None, "NORMAL": NORMALS[self.how.normalizer], "MEAN": self.how.mean,
            **self._steps("q"), **self.split, **self.both,
        }  # fmt: skip

    @cached_property
    def apply_launch(self) -> Launch:
        strides = (*self._across("q"), *self._row_stride("q_cos"))
        told = (self.how.scale, self.how.eps)
        return self._launch(kernels.apply_kernel, "apply", self.heads, self._query_constants(), strides, self.q_tokens, *told)

    @cached_property
    def apply_back_launches(self) -> dict[tuple[bool, bool, bool], Launch]:
        """By whether they add up the record's gradient, write q's, and do so in two passes."""
        strides = (*self._across("q", "do"), *self._row_stride("q_cos"))
        found = {}
        for sums, out, twice in ((True, True, False), (True, False, False), (True, False, True), (False, True, True), (False, True, False)):
            if sums and out and self.same["TWO"]:
                continue  # two signs have these in two passes
            more = out and twice and self.how.averaged
            constants = {**self._query_constants(), **self._steps("do"), "SUMS": sums, "OUT": out, "TWICE": twice, "MORE": more}
            told = (self.gather_back_launch.runs if twice and self.kinds["k"] is not None else 1, self.how.scale, self.how.eps)
            name = "apply_back_both" if sums and out else "apply_back" if sums else "apply_back_out"
            kernel = backward.apply_back_kernel
            found[sums, out, twice] = self._launch(kernel, name, self.heads, constants, strides, self.q_tokens, *told)
        return found

    def combine_launch(self, runs: int, grad: bool) -> Launch:
        run = launcher(kernels.combine_kernel, L=self.size.L, END=self.size.END, BLOCK=BLOCK, GRAD=grad, MEAN=self.how.mean, num_warps=4)
        return Launch(run, (self.rows * self.key_heads, cdiv(self.size.L, BLOCK), 1), (), (runs,), 1)

    @cached_property
    def gather_combine(self) -> Launch:
        return self.combine_launch(self.gather_launch.runs, False)

    @cached_property
    def grad_combines(self) -> dict[int, Launch]:
        """By how many runs each query head was cut into."""
        group = self.heads // self.key_heads
        counts = {launch.runs for launch in self.apply_back_launches.values()}
        return {count: self.combine_launch(count * group, True) for count in counts}

    # ---- calls -----------------------------------------------------------------------------------------------------

    def mean(self, q: Tensor, x: Tensors) -> Tensor:
        """The mean of φ(q): ``[rows, heads of q, 1, F]``."""
        sums = self.empty(self.rows, self.q_heads, self.mean_launch.runs, self.size.F)
        self.mean_launch(q, sums, q if x.cu is None else x.cu)
        return sums if self.mean_launch.runs == 1 else sums.sum(2, keepdim=True)

    def _key_tensors(self, x: Tensors, queries: Tensor | None) -> list[Tensor]:
        k = x.k
        assert k is not None and x.v is not None
        return [k, x.v, *[k if t is None else t for t in (queries, x.logits, x.factors, x.seen, x.k_cos, x.k_sin, x.cu)]]

    def gather(self, x: Tensors, queries: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The record ``[rows, key heads, L]``, and with queries the logits ``[B, N, key heads]``."""
        runs = self.gather_launch.runs
        parts = self.empty(self.rows, self.key_heads, runs, self.size.L)
        logits = None if queries is None else self.empty(self.batch, self.tokens, self.key_heads)
        self.gather_launch(*self._key_tensors(x, queries), parts, parts if logits is None else logits)
        if runs == 1:
            return parts[:, :, 0], logits
        record = self.empty(self.rows, self.key_heads, self.size.L)
        self.gather_combine(parts, record, parts)
        return record, logits

    def apply(self, x: Tensors, record: Tensor) -> Tensor:
        """o ``[B, N, H, V]``."""
        q = x.q
        assert q is not None
        o = self.empty(self.batch, self.q_tokens, self.heads, self.size.V, dtype=q.dtype)
        self.apply_launch(q, record, *[q if t is None else t for t in (x.q_cos, x.q_sin, x.cu)], o)
        return o

    def apply_back(
        self, x: Tensors, do: Tensor, record: Tensor, more: Tensor | None, terms: Tensor | None, *, sums: bool, out: bool
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """q's gradient ``[B, N, H, D]`` and the record's ``[rows, key heads, L]``, those of them that are asked for.

        In two passes with `terms` ``[B, N, H, 2]``, which the first fills; `more` of the second is a gradient of the mean of φ(q).
        """
        q = x.q
        assert q is not None
        launch = self.apply_back_launches[sums, out, terms is not None]
        dq = self.empty(self.batch, self.q_tokens, self.heads, self.size.D, dtype=q.dtype) if out else None
        parts = self.empty(self.rows, self.heads, launch.runs, self.size.L) if sums else None
        launch(q, do, record, *[q if t is None else t for t in (more, x.q_cos, x.q_sin, x.cu, terms, dq, parts)])
        if parts is None:
            return dq, None
        grads = self.empty(self.rows, self.key_heads, self.size.L)
        self.grad_combines[launch.runs](parts, grads, record)
        return dq, grads

    def gather_back(
        self, x: Tensors, record: Tensor, grads: Tensor, queries: Tensor | None, logits: Tensor | None
    ) -> dict[str, Tensor]:  # fmt: skip
        """Gradients per key head: k, v, and of queries ``[rows, key heads, runs, F]``, logits and factors where there are any."""
        launch, lead = self.gather_back_launch, (self.batch, self.tokens, self.key_heads)
        found = {"k": self.empty(*lead, self.size.D, dtype=self.dtype), "v": self.empty(*lead, self.size.V, dtype=self.dtype)}
        if queries is not None:
            found["query"] = self.empty(self.rows, self.key_heads, launch.runs, self.size.F)
        if x.logits is not None:
            found["logits"] = self.empty(*lead)
        if x.factors is not None:
            found["factors"] = self.empty(*lead)
        outputs = [found.get(name, grads) for name in ("query", "logits", "factors")]
        keys, values, by, *rest = self._key_tensors(x, queries)
        launch(keys, values, by, keys if logits is None else logits, *rest, record, grads, found["k"], found["v"], *outputs)
        return found
