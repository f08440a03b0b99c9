"""swap and restore: replace the attention modules of a pretrained model in place, and put them back.

>>> subquad.swap(model, "sliding-window", window=64, sinks=4)         # every layer
>>> subquad.swap(model, "gla", layers="3:1")                          # three swapped, one kept, repeating
>>> subquad.swap(model, None, layers={0: "lightning", -1: {"name": "sliding-window", "window": 128}})
>>> subquad.swap(swin, "rala", scope="window")                         # a Swin keeps its windows; "image" joins them
>>> model.generate(**inputs); model.save_pretrained("folder")         # work as before
>>> subquad.restore(model)                                            # the original, exactly
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from subquad.checks import InputError
from subquad.contract import Attention
from subquad.convert.module import SwappedAttention, make
from subquad.convert.plan import Plan, check_direction, plan, saved

__all__ = ["SwappedAttention", "plan", "restore", "swap", "swapped"]


@dataclass(frozen=True)
class Site:
    """One attention module of a model: where it stands, and its sizes."""

    path: str
    module: Any

    @property
    def original(self) -> Any:
        return self.module.original if isinstance(self.module, SwappedAttention) else self.module


@dataclass(frozen=True)
class Host:
    """A model that can be swapped: its attention modules in order, and how one is replaced."""

    model: Any
    sites: list[Site]
    causal: bool
    sizes: Callable[[Any], dict[str, int]]  # of an original module
    wrap: Callable[..., SwappedAttention]
    family: Any = None  # of transformers
    watch: Callable[[], None] = lambda: None  # an encoder's grid of tokens
    forget: Callable[[], None] = lambda: None
    options: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # of `swap`, beside the mechanism's; the first value is the default


def swap(model: Any, to: str | None = None, *, layers: Any = "all", **options: Any) -> Any:
    """Replace the attention of a model's layers by a mechanism, in place; returns the model.

    The projections, biases and query/key norms stay, under their own names. New parameters get the model's dtype and device.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 model, a BERT or RoBERTa encoder, a ViT, DeiT or Swin of transformers, or a
            VisionTransformer or SwinTransformer of timm.
        to: a mechanism's name; None if `layers` maps each layer to one.
        layers: "all", indices (negative ones from the end), a ratio such as "3:1" (three swapped, one kept, repeating), or a
            mapping from layer to a name or to {"name": …, option: …}.
        options: the mechanism's options. In Swin models also `scope`: "image" (default: each layer attends over the whole image, and
            the relative position bias is left out) or "window" (the published windows and shifts; softmax keeps the bias).

    Raises:
        InputError: nothing has been changed then.
    """
    host = find_host(model)
    wanted = plan(len(host.sites), to, layers, host_options=host.options, **options)
    for index in wanted:
        if isinstance(host.sites[index].module, SwappedAttention):
            was = f"layer {index}, which is swapped to {host.sites[index].module.name!r} already"
            raise InputError("layers", was, "layers that are not swapped; subquad.restore(model) first")
    _install(host, _make_all(host, wanted))
    return model


def restore(model: Any) -> Any:
    """Put a swapped model's original attention modules, class and config class back, in place; returns the model.

    Weights are shared with the swapped modules, so what was trained in the projections stays trained.
    """
    host = find_host(model)
    if not swapped(model):
        raise InputError("model", f"{type(model).__name__} without a swapped layer", "a model that subquad.swap changed")
    for site in host.sites:
        if isinstance(site.module, SwappedAttention):
            _place(model, site.path, site.module.release())
    host.forget()
    if host.family is not None:
        _restore_classes(host)
    return model


def swapped(model: nn.Module) -> dict[int, SwappedAttention]:
    """The swapped modules of a model by layer, in order."""
    try:
        sites = find_host(model).sites
    except InputError:
        return {}
    return {index: site.module for index, site in enumerate(sites) if isinstance(site.module, SwappedAttention)}


def check_unswapped(model: nn.Module, argument: str = "model") -> None:
    """Refuse a model with swapped layers, where `restore` would undo what somebody else did."""
    inside = swapped(model)
    if inside:
        names = ", ".join(sorted({module.name for module in inside.values()}))
        was = f"{type(model).__name__}, of whose layers {len(inside)} are swapped to {names} already"
        raise InputError(argument, was, "a model with its own attention; subquad.restore(model) first")


def put_back(model: Any, modules: Mapping[int, SwappedAttention]) -> None:
    """Put modules that `swapped` told of, and `restore` took out, back in."""
    if modules:
        _install(find_host(model), dict(modules))


def swap_as_saved(model: Any) -> None:
    """Carry out the plan in a model's config, which is how a saved model is built again."""
    layers = (getattr(model.config, "subquad", None) or {}).get("layers")
    if layers and not swapped(model):
        host = find_host(model)
        _install(host, _make_all(host, plan(len(host.sites), None, layers, host_options=host.options)))


def _make_all(host: Host, wanted: Plan) -> dict[int, SwappedAttention]:
    """All replacements, before any of them is put in: an error leaves the model as it was."""
    made = {}
    for index, (name, options) in wanted.items():
        site = host.sites[index]
        placement = {key: options.get(key, values[0]) for key, values in host.options.items()}
        options = {key: value for key, value in options.items() if key not in placement}
        options = check_direction(name, options, host.causal, type(host.model).__name__)
        sizes = host.sizes(site.original)
        mechanism = make(name, _weight(site.original), layer=(index, len(host.sites)), **sizes, **options)
        made[index] = host.wrap(site.original, mechanism, site.path, **placement)
    return made


def _weight(module: nn.Module) -> Tensor:
    return next(module.parameters())


def _install(host: Host, made: dict[int, SwappedAttention]) -> None:
    model = host.model
    for index, module in made.items():
        _place(model, host.sites[index].path, module)
    host.watch()
    if host.family is not None:
        _make_classes(host)


def _make_classes(host: Host) -> None:
    """Turn the model's classes and config into their swapped forms, and write the plan into the config."""
    from subquad.convert.saving import register_families, swapped_class, switch_config

    register_families()  # so that the Auto classes know the swapped config at once
    model, inside = host.model, swapped(host.model)
    switch_config(model, [*model.modules(), *(module.original for module in inside.values())])
    _write_plan(model, inside)
    for part in _classed_parts(host):
        if not hasattr(type(part), "plain"):
            part.__class__ = swapped_class(type(part))
    _inner(host).all_swapped = len(inside) == len(host.sites)


def _write_plan(model: Any, inside: Mapping[int, SwappedAttention]) -> None:
    layers = saved({index: module.mechanism for index, module in inside.items()})
    model.config.subquad = {"layers": {key: {**entry, **inside[int(key)].placement} for key, entry in layers.items()}}


def note_plan(model: Any) -> None:
    """Write the plan into a swapped model's config anew, after options of its mechanisms have changed."""
    host = find_host(model)
    if host.family is not None:
        _write_plan(host.model, swapped(host.model))


def _restore_classes(host: Host) -> None:
    for part in _classed_parts(host):
        if hasattr(type(part), "plain"):
            part.__class__ = type(part).plain
    config = host.model.config
    config.__class__ = type(config).plain
    del config.subquad
    config.__dict__.pop("model_type", None)  # a loaded config holds the swapped names themselves
    if config.architectures:
        config.architectures = [name.removeprefix("Subquad") for name in config.architectures]
    inner = _inner(host)
    del inner.all_swapped
    # Modules swapped out when transformers hooked all others to record attentions have no hook: have it hook them anew.
    for module in inner.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                del module._forward_hooks[key]
    inner._output_capturing_hooks_installed = False


def _inner(host: Host) -> Any:
    kind = host.family.part("Model")
    return next(module for module in host.model.modules() if isinstance(module, kind))


def _classed_parts(host: Host) -> list[Any]:
    if host.family is None:
        return []
    inner = _inner(host)
    return [host.model] if inner is host.model else [host.model, inner]


def _place(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


# ---- which models can be swapped -----------------------------------------------------------------------------------


def find_host(model: Any) -> Host:
    """Find out whether and how a model can be swapped.

    Raises:
        InputError: it cannot; the message says which attention modules it has.
    """
    if not isinstance(model, nn.Module):
        raise InputError("model", type(model).__name__, "a model of transformers or timm")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None) or "quantized"
        raise InputError("model", f"{type(model).__name__}, quantized ({method})", "a model that is not quantized")
    host = _transformers_host(model) if "transformers" in sys.modules else None
    host = host or (_timm_host(model) if "timm" in sys.modules else None)
    if host is None or not host.sites:
        raise InputError(
            "model",
            _description(model),
            "a Llama, Mistral, Qwen2, Qwen3, BERT, RoBERTa, ViT, DeiT or Swin (with its head or without) of transformers, or timm's "
            "VisionTransformer or SwinTransformer",
        )
    return host


def _description(model: nn.Module) -> str:
    counts: dict[str, int] = {}
    for module in model.modules():
        if re.search("attention|attn", type(module).__name__, re.IGNORECASE):
            counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    found = ", ".join(f"{count} × {name}" for name, count in counts.items()) or "none"
    return f"{type(model).__name__} (attention modules found: {found})"


def _sites(model: nn.Module, kinds: tuple[type, ...]) -> list[Site]:
    return [Site(path, module) for path, module in model.named_modules() if isinstance(module, (*kinds, SwappedAttention))]


def _transformers_host(model: nn.Module) -> Host | None:
    from subquad.convert.families import find_family

    family = find_family(model)
    if family is None or not isinstance(model, family.part("PreTrainedModel")):
        return None
    sites = _sites(model, (family.part("Attention"),))
    if family.causal:
        from subquad.convert.decoder import SwappedDecoderAttention

        return Host(model, sites, True, _decoder_sizes, SwappedDecoderAttention, family)
    if family.model_type == "swin":
        from subquad.convert.windows import SwappedSwinAttention

        return _swin_host(model, sites, SwappedSwinAttention, family)
    if family.model_type in ("bert", "roberta"):
        return _bert_host(model, sites, family)
    return _vit_host(model, sites, family)


def _decoder_sizes(original: Any) -> dict[str, int]:
    config = original.config
    return {
        "heads": config.num_attention_heads, "head_dim": original.head_dim, "kv_heads": config.num_key_value_heads,
        "hidden_size": config.hidden_size,
    }  # fmt: skip


def _swin_host(model: nn.Module, sites: list[Site], wrapper: Any, family: Any = None) -> Host:
    from subquad.convert.windows import SCOPES, forget_swin, watch_swin

    blocks = {site.path: model.get_submodule(site.path.rpartition(".")[0]) for site in sites}

    def sizes(original: Any) -> dict[str, int]:
        if family is not None:
            heads, head_dim, width = original.num_attention_heads, original.head_dim, original.q_proj.in_features
        else:
            heads, width = original.num_heads, original.qkv.in_features
            head_dim = original.qkv.out_features // (3 * heads)
        return {"heads": heads, "head_dim": head_dim, "hidden_size": width}

    def wrap(original: Any, mechanism: Attention, path: str, scope: str) -> SwappedAttention:
        return wrapper(original, mechanism, path, blocks[path], scope)

    return Host(
        model, sites, False, sizes, wrap, family, partial(watch_swin, model, blocks), partial(forget_swin, model, blocks), {"scope": SCOPES}
    )


def _bert_host(model: Any, sites: list[Site], family: Any) -> Host:
    from subquad.convert.text_encoder import SwappedBertAttention

    if model.config.is_decoder:
        raise InputError("model", f"{type(model).__name__} with is_decoder=True", "an encoder: its tokens see each other both ways")

    def sizes(original: Any) -> dict[str, int]:
        config = getattr(original, "self").config  # noqa: B009  a submodule of that name
        return {
            "heads": config.num_attention_heads, "head_dim": config.hidden_size // config.num_attention_heads,
            "hidden_size": config.hidden_size,
        }  # fmt: skip

    return Host(model, sites, False, sizes, SwappedBertAttention, family)


def _vit_host(model: nn.Module, sites: list[Site], family: Any) -> Host:
    from subquad.convert.encoder import SwappedViTAttention, forget_grid, watch_grid

    embeddings = next(module for module in model.modules() if isinstance(module, family.part("Embeddings")))
    prefix = embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches
    patches = embeddings.patch_embeddings.projection

    def sizes(original: Any) -> dict[str, int]:
        return {"heads": original.num_attention_heads, "head_dim": original.head_dim, "hidden_size": original.config.hidden_size}

    def wrap(original: Any, mechanism: Attention, path: str) -> SwappedAttention:
        return SwappedViTAttention(original, mechanism, path, patches, prefix)

    return Host(model, sites, False, sizes, wrap, family, partial(watch_grid, patches), partial(forget_grid, patches))


def _timm_host(model: Any) -> Host | None:
    from timm.models.swin_transformer import SwinTransformer, WindowAttention
    from timm.models.vision_transformer import VisionTransformer

    from subquad.convert.encoder import SwappedTimmAttention, forget_grid, watch_grid

    if isinstance(model, SwinTransformer):
        from subquad.convert.windows import SwappedTimmWindowAttention

        return _swin_host(model, _sites(model, (WindowAttention,)), SwappedTimmWindowAttention)
    if not isinstance(model, VisionTransformer):
        return None
    kind = _timm_attention()
    patches = getattr(model.patch_embed, "proj", None)
    sites = [site for site in _sites(model, (kind,)) if type(site.original) is kind and site.path.startswith("blocks.")]
    if len(sites) != len(model.blocks) or not isinstance(patches, nn.Conv2d):
        return None

    def sizes(original: Any) -> dict[str, int]:
        return {"heads": original.num_heads, "head_dim": original.head_dim, "hidden_size": original.qkv.in_features}

    def wrap(original: Any, mechanism: Attention, path: str) -> SwappedAttention:
        return SwappedTimmAttention(original, mechanism, path, patches, model.num_prefix_tokens)

    return Host(model, sites, False, sizes, wrap, None, partial(watch_grid, patches), partial(forget_grid, patches))


def _timm_attention() -> type:
    import timm.models.vision_transformer as vision

    return vision.Attention
