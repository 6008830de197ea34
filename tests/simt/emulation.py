"""Builds the CUDA kernels for the emulation of ``simt_emu.h`` and runs their launchers on problems given as arrays."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
KERNELS = ("pooling.cu", "backward.cu", "forward.cu")
CACHE = Path(os.environ.get("M2D_SIMT_CACHE", ROOT / "build" / "simt"))
JOBS = 2
_compilers = BoundedSemaphore(JOBS)

FLAVORS = {
    "plain": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "tsan": ["-O1", "-fsanitize=thread"],
}
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "atexit_sleep_ms=0:halt_on_error=1"}


def cuda_include() -> Path | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


def why_not() -> str | None:
    """Why nothing can be built here, or None."""
    if sys.platform != "linux":
        return "not on Linux"
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_include() is None:
        return "no CUDA headers: set CUDA_HOME"
    absent = [name for name in KERNELS if not (CSRC / "cuda" / name).exists()]
    return f"csrc/cuda has no {', '.join(absent)}" if absent else None


@cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _sources(path: Path, folders: tuple[Path, ...], found: dict[Path, str] | None = None) -> dict[Path, str]:
    """The text of a source and of all that it includes by ``#include "..."``."""
    found = {} if found is None else found
    if path not in found:
        found[path] = path.read_text()
        for name in re.findall(r'^#include "([^"]+)"', found[path], flags=re.MULTILINE):
            candidates = [(folder / name).resolve() for folder in (path.parent, *folders)]
            _sources(next(c for c in candidates if c.exists()), folders, found)
    return found


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _make(target: Path, command: list[str]) -> None:
    """Runs a compiler whose output is to become ``target``; another process may do the same at the same time."""
    if target.exists():
        os.utime(target)  # for `prune`
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    with _compilers, tempfile.TemporaryDirectory(dir=CACHE) as folder:
        output = Path(folder) / target.name
        result = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, timeout=300)
        if re.search(r"cannot find \S*(asan|ubsan|tsan)", result.stderr):
            pytest.skip("g++ has no runtime of this sanitizer")
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        os.replace(output, target)


def _object(source: Path, flavor: str, csrc: Path) -> Path:
    folders = (HERE, csrc / "cuda")
    flags = ["-std=c++20", "-g1", "-fno-omit-frame-pointer", "-Wno-unknown-pragmas", "-DM2D_EMULATE"]
    # One scheduler serves all flavors: its hooks for the sanitizers are weak symbols.
    flags += ["-O3"] if source.name == "simt_emu.cpp" else FLAVORS[flavor]
    texts = [text for _, text in sorted(_sources(source, folders).items())]
    target = CACHE / f"{source.stem}-{_key(_compiler(), str(cuda_include()), *flags, *texts)}.o"
    includes = [f"-I{folder}" for folder in folders] + ["-isystem", str(cuda_include())]
    _make(target, ["g++", *flags, *includes, "-x", "c++", "-c", str(source)])
    return target


def _executable(name: str, sources: list[Path], flavor: str, csrc: Path) -> Path:
    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(lambda source: _object(source, flavor, csrc), sources))
    target = CACHE / f"{name}-{flavor}-{_key(flavor, *(o.name for o in objects))}"
    _make(target, ["g++", *FLAVORS[flavor], *map(str, objects)])
    return target


def driver(flavor: str, csrc: Path = CSRC) -> Path:
    """The executable of ``driver.cpp`` with the kernels of a source tree."""
    kernels = [csrc / "cuda" / name for name in KERNELS]
    return _executable("driver", [HERE / "simt_emu.cpp", HERE / "driver.cpp", *kernels], flavor, csrc)


def emulator_tests(flavor: str) -> Path:
    return _executable("emulator", [HERE / "simt_emu.cpp", HERE / "test_emulator.cu"], flavor, CSRC)


def prune(keep: int = 250) -> None:
    """Deletes all but the files used last."""
    files = sorted((path for path in CACHE.glob("*") if path.is_file()), key=lambda path: -path.stat().st_mtime)
    for path in files[keep:]:
        path.unlink(missing_ok=True)


def _bytes(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        value = torch.tensor(value)
        value = value.double() if value.is_floating_point() else value.long()
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass
class Outcome:
    status: int
    errors: str
    arrays: dict[str, bytes]

    def tensor(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.frombuffer(bytearray(self.arrays[name]), dtype=dtype).reshape(shape)


def execute(command: list[Any], timeout: float) -> subprocess.CompletedProcess[str]:
    """Runs an executable of a build; one that takes too long has status 124."""
    command = list(map(str, command))
    environment = {**os.environ, **ENVIRONMENT}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end after {timeout} s")
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run under this kernel's address space randomization")
    return done


def run(
    executable: Path, launcher: str, problem: dict[str, Any], seeds: list[int], grids: list[int], timeout: float = 120
) -> Outcome:
    """One launcher on one problem, with every seed on every grid; the results are those of all of them."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "problem"), Path(folder, "results")
        with source.open("wb") as file:
            for name, value in problem.items():
                data = _bytes(value)
                file.write(struct.pack("q", len(name)) + name.encode() + struct.pack("q", len(data)) + data)
        lists = [",".join(map(str, numbers)) for numbers in (seeds, grids)]
        done = execute([executable, launcher, source, target, *lists], timeout)
        arrays = _read(target.read_bytes()) if target.exists() else {}
    return Outcome(done.returncode, done.stderr, arrays)


def _read(data: bytes) -> dict[str, bytes]:
    arrays = {}
    while data:
        (size,) = struct.unpack_from("q", data)
        name, data = data[8 : 8 + size].decode(), data[8 + size :]
        (size,) = struct.unpack_from("q", data)
        arrays[name], data = data[8 : 8 + size], data[8 + size :]
    return arrays
