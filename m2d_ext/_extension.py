"""Loads the compiled extension m2d_ext._C, once, and only under the torch it was built with."""

import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._version import __version__

_PACKAGE = Path(__file__).resolve().parent
# Written by setup.py beside the extension; absent in a source tree that was never built.
_CONFIG_PATH = _PACKAGE / "_build_config.json"


def _is_source_tree() -> bool:
    return _PACKAGE.with_name("setup.py").exists()


def _reinstall() -> str:
    """The command: where the package runs from its source tree, an installation elsewhere would not be imported."""
    return f"pip install --no-build-isolation --no-deps {'-e' if _is_source_tree() else '--force-reinstall'} ."


_REINSTALL = _reinstall()
HOW_TO_BUILD = f"build it with `M2D_BUILD=cpu {_REINSTALL}` (or M2D_BUILD=cuda) in the source directory of m2d_ext"
STALE = (
    "m2d_ext has a compiled extension of another version than its Python files: "
    f"reinstall with `{_REINSTALL}` in the source directory of m2d_ext."
)


def missing() -> str:
    """Why there is no compiled extension and what to do, in words that follow "m2d_ext"."""
    hidden = _hidden_installation()
    if hidden is None:
        return f"was installed without its compiled extension: {HOW_TO_BUILD}"
    return (
        f"is imported from {_PACKAGE}, where no extension was compiled, and not from {hidden}, where one "
        f"was: start Python in another folder, or run `{_REINSTALL}` in this one"
    )


def _hidden_installation() -> Path | None:
    """Where the package runs in a source tree that was built for an installation elsewhere: that one."""
    if not _is_source_tree():
        return None
    for folder in sys.path:
        package = Path(folder).resolve() / _PACKAGE.name
        if package != _PACKAGE and any(package.glob("_C.*")):
            return package
    return None


def _read_config() -> dict[str, Any]:
    """What setup.py recorded."""
    if not _CONFIG_PATH.exists():
        return {"build": "none"}
    config: dict[str, Any] = json.loads(_CONFIG_PATH.read_text())
    return config


def _describe(version: str, cuda: str | None) -> str:
    """What the binary interface of torch depends on: the release and the CUDA version, not the local tag."""
    return f"torch {version.split('+')[0]} ({f'CUDA {cuda}' if cuda else 'no CUDA'})"


def _load(config: dict[str, Any]) -> ModuleType | None:
    """The module m2d_ext._C, or None if nothing was built for this interpreter.

    Raises ImportError if it was built with another torch. That is found out before the library is opened, which
    would at best die on a missing symbol and at worst call functions whose arguments have changed.
    """
    if config["build"] == "none" or importlib.util.find_spec("m2d_ext._C") is None:
        return None
    built = _describe(config["torch"], config["cuda"])
    running = _describe(torch.__version__, torch.version.cuda)
    if built != running:
        raise ImportError(
            f"m2d_ext was built with {built} but {running} is running: "
            f"reinstall with `{_REINSTALL}` in the source directory of m2d_ext."
        )
    return importlib.import_module("m2d_ext._C")


_config = _read_config()
_module = _load(_config)
_warned = False


def available() -> bool:
    """Whether the compiled extension is loaded."""
    return _module is not None


def require() -> None:
    """Raise RuntimeError, which says how to build it, if the compiled extension is not loaded."""
    if not available():
        raise RuntimeError(f"m2d_ext {missing()}.")


@torch.compiler.assume_constant_result  # torch.compile cannot trace a warning; it is given as it traces
def warn_missing_once(reason: str) -> None:
    """Warn (UserWarning) that the slower PyTorch reference is used, at the first call in a process only.

    Args:
        reason: in words that follow "m2d_ext".
    """
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"m2d_ext {reason}; it uses its slower PyTorch reference instead.", stacklevel=3)


def deferrable(states: Sequence[Tensor], blocks: int) -> tuple[list[int], Tensor | None]:
    """``deferrable`` of csrc/deferred.h; only where the extension is loaded."""
    require()
    found: tuple[list[int], Tensor | None] = _module.deferrable(states, blocks)  # type: ignore[union-attr]
    return found


def deferred_hooks(*arguments: Any) -> Any:
    """A new ``DeferredHooks`` of csrc/deferred.h; only where the extension is loaded."""
    require()
    return _module.DeferredHooks(*arguments)  # type: ignore[union-attr]


def cuda_arches() -> list[str]:
    """What the CUDA kernels were compiled for, as in TORCH_CUDA_ARCH_LIST; empty where there are none."""
    return list(_config.get("cuda_arches", []))


def build_info() -> dict[str, Any]:
    """What was compiled and what it runs with. Needs no extension and raises nothing.

    Keys: version (of m2d_ext), build ("cpu", "cuda" or "none"), torch and cuda (running), torch_built and
    cuda_built (None where nothing was compiled), cuda_arches (list), cpu_capability (the vector instructions that
    torch uses), python; with an extension also compiler and openmp.
    """
    compiled: dict[str, Any] = _module.build_info() if _module is not None else {}
    return {
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **compiled,
        "version": __version__,
        "build": _config["build"] if available() else "none",
        "torch": torch.__version__,
        "torch_built": _config.get("torch"),
        "cuda": torch.version.cuda,
        "cuda_built": _config.get("cuda"),
        "cuda_arches": cuda_arches(),
        "python": sys.version.split()[0],
    }
