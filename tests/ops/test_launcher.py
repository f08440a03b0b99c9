"""First launches: rehearsed, compiled side by side, and right about which kernels a call needs."""

import _thread
import threading
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from subquad.ops import launcher
from subquad.ops.delta import delta_rule
from subquad.ops.launcher import Launcher, Missing, prepared, rehearse
from subquad.ops.linear import linear_attention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is counted here is counted in Triton's interpreter")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setenv("SUBQUAD_KERNELS", "on")


def call(form):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, 16, requires_grad=True) for _ in range(3))
    g = {"token": (1, 70, 2), "channel": (1, 70, 2, 16)}.get(form.split()[-1])
    given = {} if g is None else {"log_decay": (-0.1 * torch.rand(g)).requires_grad_()}
    if form.startswith("delta"):
        return partial(delta_rule, q, torch.nn.functional.normalize(k, dim=-1), v, torch.rand(1, 70, 2).requires_grad_(), **given)
    return partial(linear_attention, q, k, v, **given)


FORMS = ["linear", "linear token", "linear channel", "delta", "delta token"]


@pytest.mark.parametrize("form", FORMS)
def test_a_rehearsed_forward_names_the_backwards_kernels_too(form, monkeypatch):
    """What forward and backward then launch is what the rehearsal of the forward alone asked to be compiled."""
    rehearsed, launched = set(), set()
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Launcher, "compile", lambda *_: None)
    first = Launcher._first

    def spy(self, key, *arguments):
        first(self, key, *arguments)
        (launched if launcher._thread.jobs is None else rehearsed).add((self, key))

    monkeypatch.setattr(Launcher, "_first", spy)
    o = call(form)()
    asked = set(rehearsed)
    assert len(launched) < len(asked)
    o.backward(torch.randn_like(o))
    assert asked == launched


def test_saved_tensors_are_unpacked_once(monkeypatch):
    """Where the backward's kernels are missing it starts anew; checkpointing refuses to give a tensor twice."""
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Launcher, "compile", lambda *_: None)
    packed, unpacked = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(1) or x, lambda x: unpacked.append(1) or x):
        o = call("delta token")()
    o.backward(torch.randn_like(o))
    assert len(packed) == len(unpacked) > 0
    run = call("linear token")
    torch.utils.checkpoint.checkpoint(lambda: run() ** 2, use_reentrant=False).sum().backward()


def test_prepared_starts_anew_and_nests(monkeypatch):
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen = []

    def needs(name):
        def run():
            seen.append((name, launcher._thread.strict))
            if launcher._thread.strict:
                raise Missing
            return name

        return run

    def outer():
        inner = prepared(needs("inner"), lambda: seen.append("rehearsal"))
        return inner, needs("outer")()

    assert prepared(outer, lambda: seen.append("whole rehearsal")) == ("inner", "outer")
    # the inner call leaves the outer one strict; only the last run of all may compile
    assert seen[:3] == [("inner", True), "rehearsal", ("inner", True)]
    assert seen[-1] == ("outer", False)
    assert not launcher._thread.strict


def test_errors_of_the_compiler_reach_the_caller(monkeypatch):
    monkeypatch.setattr(launcher, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def fail(*_):
        raise ValueError("no such instruction")

    monkeypatch.setattr(Launcher, "compile", fail)
    with pytest.raises(ValueError, match="no such instruction"):
        call("linear")()
    monkeypatch.undo()
    monkeypatch.setenv("SUBQUAD_KERNELS", "on")
    assert call("linear")().isfinite().all()


def test_without_memory_for_a_rehearsal_kernels_are_compiled_as_they_come():
    def too_large():
        raise torch.OutOfMemoryError("out of memory")

    rehearse(too_large)
    assert launcher._thread.jobs is None


def test_threads_that_compile_are_those_of_the_first_call(monkeypatch):
    """Asked by a thread that is none of Python's, as autograd's are, it would start daemons, which Python does not wait for."""
    launcher._compilers.cache_clear()
    seen, made = [], []
    monkeypatch.setattr(Launcher, "compile", lambda *_: seen.append(threading.current_thread()))

    def ask():
        def call():
            made.append(Launcher(SimpleNamespace(arg_names=()), {}))
            launcher._thread.jobs[made[-1], (torch.device("cpu"),)] = ()

        rehearse(call)
        made[-1].coming[torch.device("cpu"),].result()
        done.release()

    done = threading.Semaphore(0)
    ask()
    before = set(threading.enumerate())
    _thread.start_new_thread(ask, ())
    assert done.acquire(timeout=9) and done.acquire(timeout=9)
    assert len(seen) == 2 and all(not t.daemon and t in before for t in seen)


def test_a_descriptor_is_what_its_checks_would_let_pass():
    x = torch.zeros(2, 70, 4, 48, dtype=torch.bfloat16)
    turned = x.transpose(1, 2)
    whole = TensorDescriptor(turned, list(turned.shape), list(turned.stride()), [1, 1, 32, 64])
    made = launcher.Described.of(x.shape, x.stride(), 32, 64).at(x)
    assert made.base is x
    for field in fields(TensorDescriptor):
        if field.name != "base":
            assert getattr(made, field.name) == getattr(whole, field.name), field.name


@pytest.mark.parametrize(
    "x, said",
    [
        (torch.zeros(2, 8, 4, 16), True),
        (torch.zeros(2, 8, 4, 15), False),  # heads 60 bytes apart
        (torch.zeros(2 * 8 * 4 * 16 + 1)[1:].view(2, 8, 4, 16), False),  # begins off 16 bytes
        (torch.zeros(2, 1, 4, 16).expand(2, 8, 4, 16), False),
        (torch.zeros(1, 8, 4, 16), False),  # shared by the rows of the batch
        (torch.zeros(2, 1, 4, 16), False),
        (None, False),
    ],
)
def test_what_descriptors_can_name(x, said):
    assert launcher.describable(x, 2) is said


def test_a_rehearsal_keeps_no_tensor_behind_a_descriptor(monkeypatch):
    x = torch.zeros(1, 512, 1, 64)
    told = launcher.Described.of(x.shape, x.stride(), 64, 64).at(x)
    one = Launcher(SimpleNamespace(arg_names=()), {}, num_warps=4)
    monkeypatch.setattr(launcher._thread, "jobs", {})
    one((1, 1, 1), (x, told), (), ())
    (kept,) = launcher._thread.jobs.values()
    assert kept[0] == torch.float32 and kept[1].base.numel() == 1 and kept[1].shape == told.shape and told.base is x


def test_no_sequences_launch_nothing():
    q, k, v = (torch.randn(1, 0, 2, 16) for _ in range(3))
    o, state = linear_attention(q, k, v, log_decay=torch.zeros(1, 0, 2), cu_seqlens=torch.tensor([0]), return_state=True)
    assert o.shape == (1, 0, 2, 16) and state.shape == (0, 2, 16, 16)
