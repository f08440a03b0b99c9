"""Planting faults: a function's code is replaced, wherever it is imported, for as long as a `with` block lasts."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import Any
from unittest.mock import patch

from subquad import contract


def functions_of(module: ModuleType, namespace: dict[str, Any]) -> dict[str, FunctionType]:
    """The functions and methods written in a module, by qualified name, without their decorators."""
    found = {}
    for owner in (namespace, *(vars(x) for x in namespace.values() if isinstance(x, type) and x.__module__ == module.__name__)):
        for value in owner.values():
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            function = inspect.unwrap(value) if callable(value) else None
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                found[function.__qualname__] = function
    return found


@contextmanager
def edited(name: str, *changes: tuple[str, str]) -> Iterator[None]:
    """Run with each (old, new) text replaced in the source of module `name`."""
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    for old, new in changes:
        assert old in source, f"the fault must be rewritten: {name} has no {old!r} any more"
        source = source.replace(old, new)
    with patch.dict(contract._REGISTRY):
        scratch = {"__name__": name, "__file__": module.__file__, "__package__": module.__package__}
        exec(compile(source, str(module.__file__), "exec"), scratch)  # registers a mechanism's edited class, within this block
        before: dict[FunctionType, CodeType] = {}
        new_functions = functions_of(module, scratch)
        for qualname, function in functions_of(module, vars(module)).items():
            before[function] = function.__code__
            function.__code__ = new_functions[qualname].__code__
        try:
            yield
        finally:
            for function, code in before.items():
                function.__code__ = code


@contextmanager
def wrapped(primitive: str, change: Any) -> Iterator[None]:
    """Run with a primitive of `subquad.ops` replaced by ``change(original, *args, **kwargs)`` in every mechanism."""
    package = importlib.import_module(f"subquad.ops.{primitive.split('.')[0]}")
    original = getattr(package, primitive.split(".")[1])
    users = {importlib.import_module(contract._REGISTRY[n].__module__) for n in contract._REGISTRY}

    def faulty(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs)

    with ExitStack() as stack:
        for module in {package, *users}:
            for attribute, value in list(vars(module).items()):
                if value is original:
                    stack.enter_context(patch.object(module, attribute, faulty))
        yield
