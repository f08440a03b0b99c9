"""Which layer gets which mechanism: `plan` resolves what the user wrote into one entry per layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from subquad.checks import InputError, nearest
from subquad.contract import Attention, mechanism, mechanisms, option_defaults

Plan = dict[int, tuple[str, dict[str, Any]]]  # layer -> (mechanism's name, options)


HostOptions = Mapping[str, tuple[str, ...]]  # options that a kind of model adds to the mechanism's, and their values


def plan(count: int, to: str | None, layers: Any = "all", *, host_options: HostOptions | None = None, **options: Any) -> Plan:
    """Resolve `layers` of a model with `count` layers.

    >>> plan(4, "gla", "3:1")
    {0: ('gla', {}), 1: ('gla', {}), 2: ('gla', {})}
    >>> plan(4, None, {0: "gla", -1: {"name": "sliding-window", "window": 64}})
    {0: ('gla', {}), 3: ('sliding-window', {'window': 64})}

    Args:
        to: the mechanism's name; None if `layers` is a mapping that names one for each layer.
        layers: "all"; layer indices, negative ones from the end; a ratio "swapped:kept", repeating from the first layer;
            or a mapping from layer to a name or to {"name": …, option: …}.
        host_options: options that this kind of model adds, and their values.
        options: for every layer, unless its own entry says otherwise.
    """
    host = host_options or {}
    if isinstance(layers, Mapping):
        return _from_mapping(count, to, layers, options, host)
    if not isinstance(to, str):
        raise InputError("to", to, "the name of a mechanism, or a mapping from layer to mechanism in layers")
    _check_options(to, options, host)
    return {index: (to, dict(options)) for index in _indices(count, layers)}


def _indices(count: int, layers: Any) -> list[int]:
    wanted = f'"all", layer indices, a ratio such as "3:1" or a mapping (the model has {count} layers)'
    if isinstance(layers, str):
        if layers == "all":
            return list(range(count))
        swapped, colon, kept = layers.partition(":")
        if not (colon and swapped.isdecimal() and kept.isdecimal() and int(swapped)):
            raise InputError("layers", repr(layers), wanted)
        return [index for index in range(count) if index % (int(swapped) + int(kept)) < int(swapped)]
    if isinstance(layers, int) and not isinstance(layers, bool):
        layers = [layers]
    if not isinstance(layers, Iterable):
        raise InputError("layers", layers, wanted)
    found = sorted({_index(count, index) for index in layers})
    if not found:
        raise InputError("layers", "no layer", wanted)
    return found


def _index(count: int, index: Any) -> int:
    if isinstance(index, str) and index.removeprefix("-").isdecimal():
        index = int(index)  # JSON's keys are strings
    if not isinstance(index, int) or isinstance(index, bool) or not -count <= index < count:
        raise InputError("layers", f"layer {index!r}", f"an index from {-count} to {count - 1}: the model has {count} layers")
    return index % count


def _from_mapping(count: int, to: str | None, layers: Mapping[Any, Any], options: dict[str, Any], host: HostOptions) -> Plan:
    found: Plan = {}
    for key, entry in layers.items():
        index = _index(count, key)
        if index in found:
            raise InputError("layers", f"layer {index} twice", "each layer once")
        own = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        name = own.pop("name", to)
        if not isinstance(name, str):
            raise InputError("layers", f"{entry!r} for layer {index}", 'a mechanism\'s name or {"name": …, option: …}')
        _check_options(name, {**options, **own}, host)
        found[index] = (name, {**options, **own})
    if not found:
        raise InputError("layers", "an empty mapping", f"at least one of the {count} layers")
    return dict(sorted(found.items()))


def _check_options(name: str, options: Mapping[str, Any], host: HostOptions) -> None:
    known = option_defaults(mechanism(name))
    for option, value in options.items():
        if option in host:
            if value not in host[option]:
                raise InputError(option, repr(value), " or ".join(map(repr, host[option])))
            continue
        if option not in known:
            raise nearest(option, option, known, f"option of {name}")
        try:
            json.dumps(value)
        except TypeError:
            raise InputError(option, repr(value), "a value that JSON can hold, as it is saved with the model") from None


def check_direction(name: str, options: dict[str, Any], causal: bool, model: str) -> dict[str, Any]:
    """The options for a causal (or bidirectional) model, or an error if the mechanism is not for such models."""
    card = mechanism(name).card
    if not (card.causal if causal else card.bidirectional):
        can = [other for other, c in mechanisms().items() if (c.causal if causal else c.bidirectional)]
        want, is_ = ("causal", "bidirectional") if causal else ("bidirectional", "causal")
        raise InputError("to", f"{name!r}, which is {is_} only", f"a {want} mechanism for {model}: {', '.join(can) or 'none'}")
    if "causal" not in option_defaults(mechanism(name)):
        return options
    if options.get("causal", causal) is not causal:
        raise InputError("causal", options["causal"], f"{causal}, as {model} is {'causal' if causal else 'bidirectional'}")
    return {**options, "causal": causal}


def saved(modules: Mapping[int, Attention]) -> dict[str, dict[str, Any]]:
    """A plan as JSON holds it, all options spelt out so that later defaults do not change a saved model."""
    return {str(index): {"name": module.card.name, **_storable(module.options)} for index, module in sorted(modules.items())}


def _storable(options: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in options.items():
        try:
            json.dumps(value)
        except TypeError:
            continue  # a default that JSON cannot hold; given options were checked
        kept[name] = value
    return kept
