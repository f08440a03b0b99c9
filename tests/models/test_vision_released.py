"""Checkpoints that hold other things than a model's numbers, of which torch would copy some without a word."""

import re

import pytest
import torch

from subquad import InputError
from subquad.bench.images import load_weights
from subquad.models.vision import vision_model
from subquad.models.vision.released import load_released

SMALL = {"img_size": 32, "dim": 8, "depth": 1, "heads": 2, "num_classes": 3}
THEIRS, OURS = "blocks.0.mlp.fc1.weight", "blocks.0.ffn.0.weight"


def small():
    return vision_model("inline_deit_tiny", **SMALL)


def released(model):
    """Its weights under the authors' names."""
    names = {r"^stem\.1\.": "patch_embed.proj.", r"\.local\.predict\.": ".attn.residual.", r"\.attn\.attn\.": ".attn."}
    names |= {r"\.ffn\.0\.": ".mlp.fc1.", r"\.ffn\.2\.": ".mlp.fc2.", r"^head\.fc\.": "head."}
    w = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        w[name] = tensor.clone()
    return w


def quantized(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


CHANGES = {
    "sparse_coo": lambda x: x.to_sparse(),
    "sparse_csr": lambda x: x.to_sparse_csr(),
    "quantized": quantized,
    "meta": lambda x: x.to("meta"),
    "complex64": lambda x: x.to(torch.complex64),
    "int64": lambda x: x.long(),
    "uint8": lambda x: x.to(torch.uint8),
    "bool": lambda x: x.bool(),
}


@pytest.mark.filterwarnings(
    "ignore:.*[Ss]parse.*:UserWarning",
    "ignore:.*quantize.*:UserWarning",
    "ignore:.*quantiz.*:DeprecationWarning",
    "ignore:TypedStorage:UserWarning",
)
@pytest.mark.parametrize("shape", ["its own", "another"])
@pytest.mark.parametrize("load", [load_released, load_weights])
@pytest.mark.parametrize("change", CHANGES)
def test_numbers_of_another_kind_are_named(tmp_path, change, load, shape):
    """By name, before shapes are looked at; the model stays as it was."""
    model, path = small(), tmp_path / "released.pth"
    w = released(small()) if load is load_released else small().state_dict()
    key = THEIRS if load is load_released else OURS
    w[key] = CHANGES[change](w[key] if shape == "its own" or load is load_weights else torch.ones(3, 5))
    torch.save({"model": w}, path)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(InputError, match=rf"released\.pth, with blocks\.0\.\S+ (of |\(){change}"):
        load(model, path)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_any_precision_is_taken(tmp_path):
    model, w = small(), released(small())
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        torch.save({name: x.to(dtype) for name, x in w.items()}, tmp_path / "released.pth")
        load_released(model, tmp_path / "released.pth")
        assert torch.equal(model.state_dict()[OURS], w[THEIRS].to(dtype).float())


def test_counts_of_a_file_cast_as_a_whole(tmp_path):
    """A batch norm's count of batches is whole in any precision; it is never complex."""
    model = vision_model("l2vit_t", dims=(8,) * 4, depths=(2,) * 4, heads=(1,) * 4)
    w = {name: x.half() for name, x in model.state_dict().items()}
    w["stem.2.num_batches_tracked"] += 9
    torch.save(w, tmp_path / "own.pth")
    load_weights(model, tmp_path / "own.pth")
    assert model.stem[2].num_batches_tracked.dtype == torch.int64 and model.stem[2].num_batches_tracked == 9
    w["stem.2.num_batches_tracked"] = torch.tensor(9j)
    torch.save(w, tmp_path / "own.pth")
    with pytest.raises(
        InputError, match=r"--weights: got .*own\.pth, with stem\.2\.num_batches_tracked of complex64 where the model has int64"
    ):
        load_weights(model, tmp_path / "own.pth")
