"""A run for test_finetune: `python spread_run.py` prints its losses and weights; each of several processes takes a share of a step.

With the argument "own" it learns from two texts.
"""

import os
import sys

import torch
from toy_mechanisms import ToyTemperature, tiny_llama

from subquad.contract import register
from subquad.convert.finetune import finetune
from subquad.convert.lora import merge_lora
from subquad.convert.swap import swap

torch.set_num_threads(1)
register("toy-temperature")(ToyTemperature)
torch.manual_seed(0)
model = swap(tiny_llama(), "toy-temperature")
tokens = torch.randint(97, (600,), generator=torch.Generator().manual_seed(1))
own = tokens.flip(0)
share = 4 // int(os.environ.get("WORLD_SIZE", "1"))
kind = {"own": own, "own_share": 0.6} if "own" in sys.argv else {"loss": "kl"}
result = finetune(model, tokens, steps=5, length=16, accumulate=share, lr=1e-2, **kind, train_mechanism=True, progress=False)
sums = [float(p.detach().double().sum()) for p in merge_lora(model).parameters()]
line = " ".join([str(result.tokens), *(f"{x:.6f}" for x in [*result.losses, *sums])])
os.write(1, f"{line}\n".encode())  # in one piece, as both processes write to one place
