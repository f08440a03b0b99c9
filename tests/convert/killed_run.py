"""A run for the tests of resuming: `python killed_run.py OUT KIND` trains in forked children that are killed, then one that is not.
KIND is "distill", "finetune", or "linearize" for both stages in one run, whose transfer "linearize-groups" carries out a layer at a time.

Prints a digest of the weights and losses of the run that was killed, and of one that was not. A child is killed as soon as a
checkpoint of the given step appears, or while the one after it is being written.
"""

import copy
import hashlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from toy_mechanisms import ToyTemperature, tiny_llama

from subquad.contract import register
from subquad.convert.distill import distill
from subquad.convert.finetune import finetune
from subquad.convert.recipe import Recipe, linearize
from subquad.convert.swap import swap

STEPS = 12


class Slow(list):
    """Batches that take a moment each, so that there is a moment to kill in."""

    def __getitem__(self, index):
        time.sleep(0.01)
        return super().__getitem__(index)


def run(out, kind):
    torch.manual_seed(3)
    teacher = tiny_llama()
    if kind.startswith("linearize"):
        return linearized(teacher, out, kind)
    student = swap(copy.deepcopy(teacher), "toy-temperature", noise=0.2)
    data = batches()
    options = {"steps": STEPS, "out": out, "save_every": 2, "progress": False}
    if kind == "distill":
        result = distill(student, teacher, data, **options)
        history = result.layer_losses
    else:
        result = finetune(student, data, loss="kl", train_mechanism=True, accumulate=2, lr=1e-2, **options)
        history = result.losses
    return digest_of(student, history, result.tokens), result.resumed_from


def linearized(model, out, kind):
    """Steps that were there already, by stage, follow the digest."""
    stages = ({"steps": STEPS, "lr": 1e-2}, {"steps": STEPS, "lr": 1e-2, "accumulate": 2, "rank": 2, "train_mechanism": True})
    recipe = Recipe("killed", "", "", "", "", (), "toy-temperature", {"noise": 0.2}, *stages)
    options = {"group": 1, "out": out or tempfile.mkdtemp()} if kind.endswith("groups") else {"out": out}
    result = linearize(model, recipe, batches(), save_every=2, progress=False, **options)
    first, second = result.transfer, result.finetune
    digest = digest_of(model, (first.layer_losses, second.losses), (first.tokens, second.tokens))
    return digest, f"{first.resumed_from},{second.resumed_from}"


def batches():
    return Slow(torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(5))


def digest_of(model, history, tokens):
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    digest.update(repr((history, tokens)).encode())
    return digest.hexdigest()


def killed(out, kind, place, step, drafts):
    """Run in a child, and kill it when the checkpoint of `step` is in out/place (or, with `drafts`, any draft after it)."""
    child = os.fork()
    if not child:
        run(out, kind)
        os._exit(0)
    found = out / place / "checkpoint"
    end = time.time() + 60
    while time.time() < end:
        there = [p.name for p in found.iterdir()] if found.exists() else []
        done = any(name.startswith("step-") and int(name[5:]) >= step for name in there)
        if done and (not drafts or any(name.startswith(".draft") for name in there)):
            break
        time.sleep(2e-4)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(out, kind):
    register("toy-temperature")(ToyTemperature)
    import peft  # noqa: F401  before the forks, as it takes seconds

    moments = ((0, False), (4, True), (8, False))
    stages = {"linearize": ("transfer", "finetune"), "linearize-groups": ("transfer/group-000", "transfer/group-002", "finetune")}
    for place in stages.get(kind, ("",)):
        for step, drafts in moments:
            assert os.WIFSIGNALED(killed(out, kind, place, step, drafts)), "the run ended before it was killed"
    digest, resumed_from = run(out, kind)
    print(digest, resumed_from)
    print(*run(None, kind))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
