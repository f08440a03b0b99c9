"""Swapped models of transformers as model classes of their own, so that they save, load and generate like any other.

`SubquadLlamaForCausalLM` is made of `LlamaForCausalLM`, with model_type "subquad_llama" and the plan in its config; the same for
every class of every family. `register_families` tells the Auto classes of them. Nothing is downloaded or run from the folder.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers.utils import output_capturing

from subquad.checks import InputError
from subquad.convert.decoder import DecoderModel, Generation
from subquad.convert.families import FAMILIES, family_of

_AUTO_CLASSES = (
    "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering", "AutoModelForMaskedLM", "AutoModelForImageClassification", "AutoModelForMaskedImageModeling",
)  # fmt: skip
_CLASSES: dict[type, type] = {}

CARD = """
## Swapped attention

This is a `{plain}` in which subquad replaced the attention of {count} of {layers} layers by {names}.

```python
import subquad
from transformers import {auto}
model = {auto}.from_pretrained("this folder")
```

`import subquad` must come before the model is loaded. Do not load it with `{plain}.from_pretrained`: that silently
gives softmax attention back, with the weights of the replaced mechanisms left unread; the only sign is a warning of unexpected keys.
"""
_CARD_TITLE = "## Swapped attention"


class SwappedModel:
    """Mixed into every swapped class of transformers: puts the mechanisms in when made from a config, and saves with a card."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        from subquad.convert.swap import swap_as_saved

        swap_as_saved(self)  # type: ignore[arg-type]

    def initialize_weights(self) -> None:
        """As transformers', after the mechanisms have seen to themselves (it knows neither their constants nor their initial values)."""
        from subquad.convert.swap import swapped

        for module in swapped(self).values():  # type: ignore[arg-type]
            module.initialise()
        super().initialize_weights()  # type: ignore[misc]

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        # A checkpoint's old key names are known to transformers for the plain family only.
        kwargs.setdefault("save_original_format", False)
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        write_card(self, Path(save_directory))
        return result

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if pretrained_model_name_or_path is not None and Path(pretrained_model_name_or_path).is_dir() and not kwargs.get("subfolder"):
            check_folder(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]


def swapped_class(plain: type) -> type:
    """The swapped class made of a transformers model or config class."""
    if plain in _CLASSES:
        return _CLASSES[plain]
    family = family_of(plain)
    body: dict[str, Any] = {"__module__": __name__, "__doc__": f"{plain.__name__} with swapped attention.", "plain": plain}
    if hasattr(plain, "from_pretrained") and hasattr(plain, "config_class") and plain.config_class is not None:  # a model
        body["config_class"] = swapped_class(family.config_class())
        mixins: list[type] = [SwappedModel]
        if plain.__name__ == f"{family.prefix}Model" and family.causal:
            mixins.append(DecoderModel)
        if hasattr(plain, "generate"):
            mixins.append(Generation)
        made = type(f"Subquad{plain.__name__}", (*mixins, plain), body)
        # transformers looks up by the class's name what output_hidden_states and output_attentions can record.
        dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(made), getattr(made, "_can_record_outputs", None))
    else:
        made = type(f"Subquad{plain.__name__}", (plain,), {**body, "model_type": f"subquad_{family.model_type}"})
    _CLASSES[plain] = made
    return made


def __getattr__(name: str) -> Any:
    """Swapped classes by name, which is how pickle finds them."""
    if name.startswith("Subquad"):
        for family in FAMILIES:
            for module in (family.module(), import_module(family.config_class().__module__)):
                plain = getattr(module, name.removeprefix("Subquad"), None)
                if isinstance(plain, type):
                    return swapped_class(plain)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_registered: list[str] = []


def register_families() -> None:
    """Tell transformers' Auto classes about every swapped class, once."""
    if _registered:
        return
    _registered.extend(family.model_type for family in FAMILIES)  # first: registering may read configs itself
    auto = import_module("transformers.models.auto.modeling_auto")
    configs = import_module("transformers.models.auto.configuration_auto")
    for family in FAMILIES:
        config = swapped_class(family.config_class())
        configs.AutoConfig.register(f"subquad_{family.model_type}", config, exist_ok=True)
        for name in _AUTO_CLASSES:
            mapping = getattr(auto, name)._model_mapping
            found = mapping.get(family.config_class(), None)
            if found is not None:
                made = tuple(map(swapped_class, found)) if isinstance(found, tuple) else swapped_class(found)
                mapping.register(config, made, exist_ok=True)
    _register_tokenizers(configs)


def _register_tokenizers(configs: Any) -> None:
    """Swapped models keep their family's tokenizer."""
    tokenizers = import_module("transformers.models.auto.tokenization_auto").TOKENIZER_MAPPING
    for family in FAMILIES:
        found = tokenizers.get(family.config_class(), None)
        if found is not None:
            tokenizers.register(swapped_class(family.config_class()), found, exist_ok=True)


def write_card(model: Any, folder: Path) -> None:
    """Write how to load the model into the folder's README.md, keeping what is there."""
    layers = model.config.subquad["layers"]
    plain = type(model).plain
    auto = "AutoModel" + plain.__name__.removeprefix(family_of(plain).prefix).removeprefix("Model")
    auto = max((name for name in _AUTO_CLASSES if auto.startswith(name)), key=len)
    names = ", ".join(sorted({f"`{entry['name']}`" for entry in layers.values()}))
    from subquad.convert.swap import find_host

    text = CARD.format(plain=plain.__name__, count=len(layers), layers=len(find_host(model).sites), names=names, auto=auto)
    path = folder / "README.md"
    before = path.read_text(encoding="utf-8") if path.exists() else f"---\nlibrary_name: transformers\n---\n\n# {type(model).__name__}\n"
    if _CARD_TITLE in before:
        before = before[: before.index(_CARD_TITLE)].rstrip() + "\n"
    path.write_text(before + text, encoding="utf-8")


def check_folder(path: str | Path) -> Path:
    """Check that a saved model's files are there and whole.

    Raises:
        InputError: naming the file that is missing or damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError("path", f"{folder}, which is not a folder", "a folder with config.json and model.safetensors")
    _read_json(folder / "config.json")
    index = next(iter(sorted(folder.glob("*.index.json"))), None)
    names = sorted(set(_read_json(index).get("weight_map", {}).values())) if index else ["model.safetensors"]
    if not index and not (folder / names[0]).exists() and (folder / "pytorch_model.bin").exists():
        return folder  # torch's own format tells of damage when it is read
    for name in names:
        if name.endswith(".safetensors") or not (folder / name).exists():
            _check_safetensors(folder / name)
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError("path", f"no file {path}", "a folder that save_pretrained wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON's and Unicode's errors
        raise InputError("path", f"{path}, which is damaged ({error})", "a file of valid JSON") from None
    if not isinstance(content, dict):
        raise InputError("path", f"{path}, which holds a {type(content).__name__}", "a JSON object")
    return content


def _check_safetensors(path: Path) -> None:
    """The header's length and content against the file's size: 8 bytes, JSON, then the tensors without a gap."""
    if not path.is_file():
        raise InputError("path", f"no file {path}", "all weight files of the model")
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if 8 + length <= size else b"")
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise InputError("path", f"{path}, which is damaged (its header cannot be read)", "a whole safetensors file") from None
    if size != 8 + length + end:
        raise InputError("path", f"{path}, which is damaged ({size} bytes)", f"{8 + length + end} bytes, as its header says")


def switch_config(model: Any, modules: list[torch.nn.Module]) -> None:
    """Give the model a config of its own of the swapped class (configs may be shared between models)."""
    plain = model.config
    if hasattr(type(plain), "plain"):
        return
    import copy

    config = copy.deepcopy(plain)
    config.__class__ = swapped_class(type(plain))
    for module in modules:
        if module.__dict__.get("config") is plain:
            module.config = config
