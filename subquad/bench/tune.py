"""`subquad tune`: measures launch parameters on this machine's GPU and gives rows for `subquad.ops.launch`.

Each kernel is tried with a few sizes of tile, warps and stages, where programs are many and where they are few. Candidates
are compiled in processes side by side, as that takes longest. One counts only if it gives the numbers of the plainest
parameters, which come first, and if `choose` would take it at the shape it was timed at. What a compiler makes of some
parameters loses the device to the whole process: each row is found in a process apart, and once more without those. For a
pass of few programs the row for many is a candidate too: `choose` then cuts the sequences into segments. A row stays unless
another is 2% faster. "pass" is timed as the whole linear operator, forward and backward, "heavy" in both directions; the
others one call each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.bench.machine import synchronize
from subquad.bench.progress import bar
from subquad.ops import launch
from subquad.ops.common import CHUNK
from subquad.ops.delta.launch import inverse, inverse_shape, mirror, solve
from subquad.ops.launch import Config
from subquad.ops.linear import channel, fused
from subquad.ops.linear.launch import linear_pass, prepare

Shape = tuple[int, int, int, int]  # batch, tokens, heads, head dim
Results = dict[str, Tensor]

KERNELS = {  # slowest first
    **dict.fromkeys(("pass", "heavy"), ("channel", "scalar", "none")),
    **dict.fromkeys(("keys", "queries", "mirror", "solve", "inverse"), ("scalar", "none")),
}
CUTTABLE = launch.CUT
MANY = {
    **{kernel: [(64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 4, 4), (32, 4, 3), (128, 8, 2), (128, 8, 3)] for kernel in ("pass", "heavy")},
    **{kernel: [(64, 4, 1), (64, 4, 2), (64, 4, 3), (32, 4, 2), (32, 4, 3), (64, 8, 2), (128, 8, 2)] for kernel in ("keys", "queries")},
    "mirror": [(64, 4, 1), (64, 4, 2), (64, 4, 3), (32, 4, 2), (128, 8, 1), (128, 8, 2)],
    "solve": [(64, 4, 1), (64, 4, 2), (64, 4, 3), (32, 4, 2), (128, 8, 1), (128, 8, 2)],
    "inverse": [(64, 1, 1), (64, 2, 1), (64, 4, 1)],
}
FEW = {
    **{kernel: [(32, 4, 2), (32, 4, 3), (32, 4, 4), (16, 4, 4)] for kernel in CUTTABLE},
    **{kernel: [(32, 4, 2), (32, 4, 3), (16, 4, 3), (16, 4, 4)] for kernel in ("mirror", "solve")},
}
CUT = [(64, 4, 2), (64, 4, 3)]  # likely best of many: compiled for sequences cut into segments as well
WIDE = [(64, 4, 1), (64, 8, 1), (32, 8, 1), (32, 4, 2), (16, 4, 1), (16, 4, 2)]  # float32, in both regimes
REFERENCE = (32, 4, 1)  # nothing is pipelined, and it fits everywhere
TOLERANCE = {16: 2e-2, 32: 1e-4}  # of the difference's norm, by bits: candidates round alike, but add in another order
SLACK = 1.02


class Case(NamedTuple):
    """A row of the table to be found."""

    kernel: str
    decay: str
    width: int
    bits: int

    @property
    def key(self) -> tuple[str, int, int, str]:
        return self.kernel, launch.padded(self.width), self.bits, self.decay


class Row(NamedTuple):
    """A row found. By regime, "many" or "few": ms of what is proposed and of the row in use (None: not timed), and of all tried;
    `wrong` gave other numbers than the reference."""

    case: Case
    many: Config
    few: Config
    ms: dict[str, tuple[float | None, float | None]]
    tried: dict[str, dict[Config, float]]
    wrong: list[Config]

    @property
    def line(self) -> str:
        """As it stands in the table."""
        times = "; ".join(f"{regime} {_ms(best)} ms, was {_ms(before)}" for regime, (best, before) in self.ms.items())
        pair = ", ".join(f"Config({c.columns}, {c.warps}, {c.stages})" for c in (self.many, self.few))
        key = ", ".join(f'"{x}"' if isinstance(x, str) else str(x) for x in self.case.key)
        wrong = "".join(f"; WRONG: {tuple(config)}" for config in self.wrong)
        return f"    ({key}): ({pair}),  # {times}{wrong}"

    def saved(self) -> dict[str, Any]:
        """For a file that `subquad.ops.launch` reads."""
        kernel, width, bits, decay = self.case.key
        tried = {regime: [[*config, ms] for config, ms in found.items()] for regime, found in self.tried.items()}
        row = {"kernel": kernel, "width": width, "bits": bits, "decay": decay, "many": self.many, "few": self.few}
        return {**row, "ms": self.ms, "tried": tried, "wrong": self.wrong}


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def candidates(case: Case, regime: str) -> list[Config]:
    """What is tried, the reference first, the row in use last; no tile is wider than the head."""
    if case.kernel == "inverse":  # it only has warps
        return list(dict.fromkeys([*(Config(*one) for one in reversed(MANY["inverse"])), current(case, regime)]))
    listed = WIDE if case.bits == 32 else (MANY if regime == "many" else FEW)[case.kernel]
    found = [Config(min(columns, launch.padded(case.width)), warps, stages) for columns, warps, stages in (REFERENCE, *listed)]
    return list(dict.fromkeys([*found, current(case, regime)]))


def current(case: Case, regime: str) -> Config:
    """The row in use."""
    return launch.config(*case.key, few=regime == "few")


def shape(case: Case, regime: str, device: str) -> Shape:
    """Where a regime is measured; tiny under the interpreter."""
    if device == "cpu":
        return (2 if regime == "many" else 1), 70, 1, case.width
    channels = 1024 if regime == "many" else 256
    return max(1, channels // case.width), (2048 if regime == "many" else 8192), 16, case.width


def regimes(case: Case, quick: bool) -> list[str]:
    """The inverse has a program a chunk, and so always many."""
    return ["many"] if case.kernel == "inverse" or (quick and case.kernel not in CUTTABLE) else ["many", "few"]


def operation(case: Case, size: Shape, dtype: torch.dtype, device: str) -> Callable[[], dict[str, Any]]:
    """A call of the kernel on operands that are like real ones in size; none needs another kernel to be compiled first."""
    torch.manual_seed(0)
    batch, tokens, heads, width = size
    q, k, v, do = (torch.randn(size, device=device, dtype=dtype) for _ in range(4))
    k, scale = F.normalize(k, dim=-1), width**-0.5
    of_decay = {"none": None, "scalar": size[:3], "channel": size}[case.decay]
    g = None if of_decay is None else -0.1 * torch.rand(of_decay, device=device)
    if case.kernel == "pass":

        def both() -> dict[str, Any]:
            o, final, kept = fused.forward(q, k, v, g, None, None, scale, False, dtype)
            need = [True, True, True, g is not None, False]
            return {"o": o, **dict(zip("qkvg", fused.backward(do, None, q, k, v, g, None, None, final, kept, scale, need)))}

        return both
    weighed = channel.weigh(q, k, g, None, heads, heads) if g is not None and case.decay == "channel" else None
    decay = prepare(g, q, None) if weighed is None else weighed.decay
    if case.kernel == "heavy":
        how: dict[str, Any] = {"cu": None, "heads": heads, "dtype": dtype, "dots": case.decay == "scalar", "split": case.decay != "none"}
        extra = q if case.decay == "none" else None
        key = k if weighed is None else weighed.k

        def gradients() -> dict[str, Any]:
            ahead = linear_pass(do, v, key, decay, x=q, column=True, add=extra, **how)
            back = linear_pass(v, do, q, decay, x=k, column=True, add=extra, reverse=True, **how)
            return {"ahead": ahead.o, "back": back.o, "dots": None if ahead.dots is None or back.dots is None else ahead.dots + back.dots}

        return gradients
    x = torch.randn_like(v)
    if case.kernel in ("keys", "queries"):  # x and v for u and w
        some: dict[str, Any] = {"cu": None, "heads": heads, "dtype": dtype, "dots": g is not None}
        if case.kernel == "queries":
            return lambda: linear_pass(do, x, k, decay, x=q, more_queries=v, **some)._asdict()
        return lambda: linear_pass(x, do, q, decay, x=k, more_keys=v, add=k, reverse=True, **some)._asdict()
    beta = 0.1 * torch.rand(batch, tokens, heads, device=device)  # small: the states must stay finite with an M that fits no keys
    if case.kernel == "inverse":
        return lambda: {"M": inverse(k, beta, decay, None)}
    M_shape, M_dtype = inverse_shape(k, heads, None)
    M = (0.02 * torch.randn(M_shape, device=device)).tril(-1).to(M_dtype)
    given: dict[str, Any] = {"scale": scale, "start": None, "final": False}
    if case.kernel == "solve":
        return lambda: dict(zip("ox", solve(q, k, v, beta, M, decay, None, save=True, **given)))
    return lambda: mirror(q, k, do, beta, M, x, decay, None, **given)._asdict()


def values(found: dict[str, Any]) -> Results:
    """Results that do not depend on the tiles."""
    return {name: x.sum(2) if name == "dots" else x for name, x in found.items() if x is not None}


def same(found: Results, wanted: Results, tolerance: float) -> bool:
    """Whether results agree to `tolerance`; what is not finite agrees with nothing."""
    return all(bool((found[name].float() - x.float()).norm() <= tolerance * x.float().norm()) for name, x in wanted.items())


def milliseconds(call: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1000 * (time.perf_counter() - start)
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=15, return_mode="median"))


class Lost(RuntimeError):
    """After this candidate the device takes no more work from the process."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.config = config


def try_all(case: Case, regime: str, configs: list[Config], dtype: torch.dtype, device: str) -> tuple[dict[Config, float], list[Config]]:
    """Milliseconds of those that launch and give the numbers of the first that does; and those that give others."""
    call = operation(case, shape(case, regime, device), dtype, device)
    tried: dict[Config, float] = {}
    wrong: list[Config] = []
    wanted: Results | None = None
    failure: Exception | None = None
    for config in configs:
        launch.use({case.key: (config, config)})
        try:
            found = values(call())
            if wanted is None:
                wanted = found
            if same(found, wanted, TOLERANCE[case.bits]):
                tried[config] = milliseconds(call, device)
            else:
                wrong.append(config)
        except Exception as error:  # out of shared memory, or Triton cannot compile it
            failure = error
            try:
                synchronize(device)
            except RuntimeError:
                raise Lost(config) from error
    if wanted is None and failure is not None:  # then the candidates are not to blame
        raise failure
    return tried, wrong


def taken(case: Case, regime: str, config: Config, device: str) -> bool:
    """Whether `choose` would take it at this regime's shape, the sequences uncut."""
    if case.kernel == "inverse":
        return True
    launch.use({case.key: (config, Config(1, 1, 1)) if regime == "many" else (Config(case.width, 1, 1), config)})
    batch, tokens, heads, width = shape(case, regime, device)
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    chosen = launch.choose(case.kernel, width, width, case.bits, where, case.decay, batch * heads, launch.cdiv(tokens, CHUNK))
    return chosen == (config, 1)


def pick(tried: dict[Config, float], now: Config, allowed: Collection[Config]) -> Config:
    """The fastest of those allowed, or the row in use if that is about as fast."""
    best = min((config for config in tried if config in allowed), key=lambda config: tried[config], default=now)
    return now if now in tried and tried[now] <= SLACK * tried[best] else best


def find(case: Case, quick: bool, dtype: torch.dtype, device: str, barred: Collection[Config] = ()) -> Row:
    """The row of one case, found without those barred: the row in use stays where it is all there is. The table is as before afterwards."""
    before = {case.key: launch.TABLE[case.key]} if case.key in launch.TABLE else {}
    now = {regime: current(case, regime) for regime in ("many", "few")}
    best, tried, wrong = dict(now), {}, list(barred)
    for regime in regimes(case, quick):
        cut = case.kernel in CUTTABLE and regime == "few"  # then equal rows for many and few are an answer, too
        try:
            listed = [*candidates(case, regime), *([best["many"]] if cut else [])]
            tried[regime], bad = try_all(case, regime, [one for one in dict.fromkeys(listed) if one not in barred], dtype, device)
            wrong += bad
            uncut = [config for config in tried[regime] if taken(case, regime, config, device)]
        finally:
            launch.TABLE.pop(case.key, None)
            launch.use(before)
        found = pick(tried[regime], now[regime], [*uncut, best["many"]] if cut else uncut)
        best[regime] = best["many"] if cut and found in tried[regime] and found not in uncut else found
    if case.kernel == "inverse":
        best["few"] = best["many"]
    ms = {regime: (found.get(best[regime]), found.get(now[regime])) for regime, found in tried.items()}
    return Row(case, best["many"], best["few"], ms, tried, wrong)


def find_apart(case: Case, quick: bool, dtype: torch.dtype, workers: list[ProcessPoolExecutor]) -> Row:
    """The row of one case, found in the process of `workers`, which is replaced where it loses the device."""
    barred: list[Config] = []
    while True:
        if not workers:
            workers.append(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")))
        try:
            return workers[0].submit(find, case, quick, dtype, "cuda", barred).result()
        except Lost as lost:
            barred.append(lost.config)
            workers.pop().shutdown(wait=False)
        except BrokenProcessPool:  # it died before it could say of what
            workers.pop()
            return Row(case, current(case, "many"), current(case, "few"), {}, {}, barred)


def compile_one(case: Case, config: Config, cut: bool, dtype: torch.dtype) -> None:
    """Leaves a candidate's kernels in Triton's cache: at a small size, as heads, head dim and strides are what is compiled in."""
    torch.set_num_threads(1)
    launch.use({case.key: (config, config)})
    try:
        operation(case, (1, 4096, 16, case.width) if cut else (2, 2 * CHUNK, 16, case.width), dtype, "cuda")()
        torch.cuda.synchronize()
    except Exception:  # the measurement will see it too
        return


def compile_all(cases: list[Case], quick: bool, dtype: torch.dtype, progress: bool) -> None:
    """All candidates, in as many processes as there are cores."""
    jobs = [(case, config, False) for case in cases for regime in regimes(case, quick) for config in candidates(case, regime)]
    for case in cases:
        if case.kernel in CUTTABLE:
            jobs += [(case, config, True) for config in (current(case, "many"), *(Config(*one) for one in CUT))]
    jobs = sorted(dict.fromkeys(jobs), key=lambda job: list(KERNELS).index(job[0].kernel))
    workers = max(1, min(os.cpu_count() or 1, 32, len(jobs)))  # each holds a context on the device
    with (
        bar("compiling", len(jobs), show=progress) as advance,
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        try:
            for _ in as_completed([pool.submit(compile_one, *job, dtype) for job in jobs]):
                advance()
        except BrokenProcessPool:  # what is missing is compiled when it is measured
            return


def tune(
    widths: list[int],
    dtype: torch.dtype,
    device: str,
    *,
    kernels: Collection[str] = tuple(KERNELS),
    quick: bool = False,
    progress: bool = False,
) -> Iterator[Row]:
    """Rows for these head dims, as they are found. `quick` measures few programs only for the pass, and keeps the others' rows for them."""
    bits = torch.finfo(dtype).bits
    cases = [Case(kernel, decay, width, bits) for width in widths for kernel in KERNELS if kernel in kernels for decay in KERNELS[kernel]]
    if device == "cuda":
        compile_all(cases, quick, dtype, progress)
    workers: list[ProcessPoolExecutor] = []
    try:
        with bar("measuring", len(cases), show=progress) as advance:
            for case in cases:
                row = find_apart(case, quick, dtype, workers) if device == "cuda" else find(case, quick, dtype, device)
                advance()
                yield row
    finally:
        for worker in workers:
            worker.shutdown(cancel_futures=True)


def save(rows: list[Row], about: dict[str, Any]) -> str:
    """The text of a file that `subquad.ops.launch.read_rows` reads, a row a line."""
    lines = ",\n".join("  " + json.dumps(row.saved()) for row in rows)
    return json.dumps(about, indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n'
