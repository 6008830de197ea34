"""What can be checked of the CUDA backend without a GPU: that it compiles, what it needs, and who it is for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from m2d_ext import _extension, functional, ops

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
KERNEL_FILES = sorted(path.name for path in CSRC.glob("cuda/*.cu"))
SHIM = Path(__file__).with_name("cuda_shim")

MAX_STATIC_SHARED_MEMORY = 48 * 1024
REGISTERS_OF_A_MULTIPROCESSOR = 64 * 1024


def _cuda_home() -> Path | None:
    """The toolkit's folder. torch looks for it only in a CUDA build of its own."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    # The file on PATH, from which torch guesses too, may be a script that calls the real one.
    guesses = [cpp_extension.CUDA_HOME or "/usr/local/cuda", Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    folders = map(Path, guesses)
    return next((folder for folder in folders if (folder / "include" / "cuda_runtime_api.h").exists()), None)


CUDA_HOME = _cuda_home()
needs_nvcc = pytest.mark.skipif(
    CUDA_HOME is None or not (CUDA_HOME / "bin" / "nvcc").exists(), reason="nvcc is not installed"
)
needs_source = pytest.mark.skipif(not CSRC.exists(), reason="not in a source tree")
pytestmark = needs_source


@pytest.fixture(scope="module")
def setup_py() -> Any:
    spec = importlib.util.spec_from_file_location("m2d_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- compilation ----


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel for one architecture, as ptxas reports it. Bytes."""

    name: str
    arch: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int


PTXAS = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'\n"
    r"(?:ptxas info .*\n)*?"
    r"\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"ptxas info\s+: Used (?P<registers>\d+) registers(?P<rest>.*)"
)


def parse_ptxas(output: str) -> list[Kernel]:
    kernels = []
    for match in PTXAS.finditer(output):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        numbers = (match["stack"], match["stores"], match["loads"], match["registers"], shared[1] if shared else 0)
        kernels.append(Kernel(match["name"], match["arch"], *map(int, numbers)))
    return kernels


def _gencode(arches: tuple[str, ...]) -> list[str]:
    numbers = [arch.replace(".", "") for arch in arches]
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


@pytest.fixture(scope="module")
def ptxas_output(setup_py: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What compiling each file for all architectures prints; two at a time, each as setup.py has it compiled."""
    folder = tmp_path_factory.mktemp("cuda")

    def compile_file(name: str) -> str:
        command = [str(CUDA_HOME / "bin" / "nvcc"), "-c", str(CSRC / "cuda" / name), "-o", str(folder / f"{name}.o")]
        command += [*cpp_extension.COMMON_NVCC_FLAGS, "-Xcompiler=-fPIC", *setup_py.NVCC_FLAGS]
        command += [*_gencode(setup_py.CUDA_ARCHES), "-Xptxas=-v", "--threads=2"]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        print(f"{name}: {time.monotonic() - start:.0f} s for {', '.join(setup_py.CUDA_ARCHES)}")
        assert done.returncode == 0, done.stderr
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(KERNEL_FILES, pool.map(compile_file, KERNEL_FILES), strict=True))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL_FILES)
def test_kernels_fit_every_architecture(ptxas_output: dict[str, str], setup_py: Any, name: str) -> None:
    output = ptxas_output[name]
    assert "warning" not in output, output
    kernels = parse_ptxas(output)
    assert len(kernels) == output.count("Compiling entry function"), "a line that was not understood"
    for arch in setup_py.CUDA_ARCHES:
        assert any(kernel.arch == f"sm_{arch.replace('.', '')}" for kernel in kernels)
    spilling = [k for k in kernels if k.stack or k.spill_stores or k.spill_loads]
    assert not spilling, "\n".join(map(str, spilling))
    threads = _threads_per_block(name)
    for kernel in kernels:
        assert kernel.shared <= MAX_STATIC_SHARED_MEMORY, kernel
        assert kernel.registers * threads <= REGISTERS_OF_A_MULTIPROCESSOR, kernel


def _threads_per_block(name: str) -> int:
    """The largest number that a constant called ...Threads... gives the kernels of this file."""
    text = "\n".join(path.read_text() for path in [CSRC / "cuda" / name, *CSRC.glob("cuda/*.cuh")])
    found = [int(n) for n in re.findall(r"constexpr int k\w*Threads\w* = (\d+);", text)]
    return max(found)


@needs_nvcc
@pytest.mark.parametrize("program", ["tests/gpu_main.cu", "benchmarks/gpu_kernels.cu"])
def test_programs_for_a_gpu_compile(program: str, tmp_path: Path) -> None:
    """Nothing else would notice without a GPU that the launchers have changed."""
    command = [str(CUDA_HOME / "bin" / "nvcc"), "-c", str(ROOT / program), "-o", str(tmp_path / "program.o")]
    command += ["-std=c++20", "-arch=sm_90", f"-I{CSRC}", "-Werror=all-warnings"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@needs_nvcc
def test_the_operators_compile_against_torch(setup_py: Any) -> None:
    """As far as a CPU build of torch goes: it brings the headers of c10/cuda, all but a generated one."""
    flags, _ = setup_py.compile_flags(torch, sanitize=False)
    # After torch's own: where its build is for CUDA, the header that it generated is the one to take.
    flags += ["-isystem", str(SHIM), "-isystem", str(CUDA_HOME / "include"), "-fsyntax-only", "-Werror"]
    command = [os.environ.get("CXX", "c++"), *flags, str(CSRC / "cuda" / "register.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_what_ptxas_prints_is_understood() -> None:
    output = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    56 bytes stack frame, 68 bytes spill stores, 272 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 56 bytes cumulative stack size, 37376 bytes smem
ptxas info    : Compile time = 28.993 ms
ptxas info    : Compiling entry function '_Z1gv' for 'sm_80'
ptxas info    : Function properties for _Z1gv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 400 bytes cmem[0]
"""
    assert parse_ptxas(output) == [
        Kernel("_Z1fv", "sm_90", 56, 68, 272, 128, 37376),
        Kernel("_Z1gv", "sm_80", 0, 0, 0, 40, 0),
    ]


def test_a_toolkit_has_nvcc_and_headers(setup_py: Any, tmp_path: Path) -> None:
    """The nvcc on PATH may be a script: the folder above it is then none."""
    usual = setup_py.cuda_toolkit(None)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    assert setup_py.cuda_toolkit(str(tmp_path)) == usual
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    assert setup_py.cuda_toolkit(str(tmp_path)) == str(tmp_path)


# ---- who may include whom ----


def _includes(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)[>\"]", path.read_text(), re.MULTILINE)


def _sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in CSRC.glob(pattern))


@pytest.mark.parametrize("path", _sources("cuda/*.cu", "cuda/*.cuh", "cuda/*.h"), ids=lambda path: path.name)
def test_kernels_know_no_tensors(path: Path) -> None:
    assert not [name for name in _includes(path) if name.startswith(("torch/", "ATen/", "c10/", "../checks"))]


@pytest.mark.parametrize("path", _sources("cuda/*", "cpu/*", "*.cpp", "*.h"), ids=lambda path: path.name)
def test_backends_do_not_include_each_other(path: Path) -> None:
    forbidden = {"cuda": ("cpu/", "../cpu/"), "cpu": ("cuda/", "../cuda/")}.get(path.parent.name, ("cpu/", "cuda/"))
    assert not [name for name in _includes(path) if name.startswith(forbidden)]
    assert not [name for name in _includes(path) if name.startswith("ATen/cuda")]


@pytest.mark.parametrize("name", ["params.h", "math.h"])
def test_what_both_backends_share_needs_nothing(name: str) -> None:
    assert not [header for header in _includes(CSRC / name) if "/" in header or "." in header]


@pytest.mark.parametrize("path", _sources("cuda/*.cu", "cuda/*.cuh"), ids=lambda path: path.name)
def test_assembly_and_conditions_stand_in_one_header(path: Path) -> None:
    found = re.findall(r"\basm\b|^\s*#\s*(?:if|ifdef|ifndef)\b|<<<", path.read_text(), re.MULTILINE)
    assert path.name == "device.cuh" or not found


# ---- which tensors the kernels take ----

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_extension = pytest.mark.skipif(not _extension.available(), reason="built without the extension")


def test_the_limits_are_those_of_the_kernels() -> None:
    text = (CSRC / "cuda" / "launch.h").read_text()
    limits = {name: int(n) for name, n in re.findall(r"constexpr int (kMax\w+) = (\d+);", text)}
    assert limits == {
        "kMaxLayers": ops.MAX_CUDA_LAYERS,
        "kMaxBlocks": ops.MAX_CUDA_BLOCKS,
        "kMaxDims": ops.MAX_CUDA_DIMS,
    }


@pytest.mark.parametrize(
    ("arch", "capability", "runs"),
    [
        ("9.0", (9, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (8, 7), False),
        ("8.7", (8, 7), True),
        ("8.7", (8, 9), False),
        ("8.0+PTX", (8, 7), True),
        ("8.0", (9, 0), False),
        ("8.0+PTX", (9, 0), True),
        ("12.0+PTX", (10, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), False),
        ("Hopper", (9, 0), True),
    ],
)
def test_which_devices_an_architecture_is_for(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert ops._runs_on(arch, capability) == runs


@pytest.fixture
def cuda_device(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A CUDA device of these properties and an extension that was compiled for CUDA, as far as they are asked."""
    found: dict[str, Any] = {"capability": (9, 0), "arches": ["8.0", "9.0"], "cooperative": True}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla X")
    monkeypatch.setattr(_extension, "cuda_arches", lambda: found["arches"])
    monkeypatch.setattr(ops, "_launches_cooperatively", lambda device: found["cooperative"])
    monkeypatch.setattr(ops, "_refusal_by_device", ops._refusal_by_cuda_device)
    return found


def test_a_device_that_has_what_it_takes(cuda_device: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert ops.refusal(CUDA, dtype, 13, 2, 5) is None


@pytest.mark.parametrize(
    ("lacking", "reason"),
    [
        ({"capability": (7, 5)}, "compute capability 8.0 or higher, and Tesla X has 7.5"),
        ({"arches": ["8.0"]}, "compiled for compute capability 8.0, and Tesla X has 9.0"),
        ({"cooperative": False}, "cooperative launches, which Tesla X does not offer"),
    ],
)
def test_a_device_that_lacks_something(cuda_device: dict[str, Any], lacking: dict[str, Any], reason: str) -> None:
    cuda_device |= lacking
    refusal = ops.refusal(CUDA, torch.float32, 2, 1, 2)
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize(
    ("dtype", "sizes", "reason"),
    [
        (torch.float64, (2, 1, 2), "no kernels for float64 on CUDA"),
        (torch.float32, (129, 1, 2), "at most 128 layers, not 129"),
        (torch.float32, (2, 9, 2), "at most 8 tensors of hidden states per layer, not 9"),
        (torch.float32, (2, 1, 17), "at most 16 dims, not 17"),
    ],
)
def test_a_problem_that_is_not_for_the_kernels(
    cuda_device: dict[str, Any], dtype: torch.dtype, sizes: tuple[int, int, int], reason: str
) -> None:
    refusal = ops.refusal(CUDA, dtype, *sizes)
    assert refusal is not None
    assert reason in refusal


@needs_extension
def test_the_cpu_takes_all(cuda_device: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert ops.refusal(CPU, torch.float64, 1000, 100, 100) is None


def test_a_refused_problem_runs_the_reference_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_warned", False)
    monkeypatch.setattr(ops, "_refusal_by_device", lambda device: "has no kernels for this test")
    states = [torch.randn(4, 3, 8, requires_grad=True) for _ in range(2)]
    options: dict[str, Any] = {"dims": [4, 8], "weights": [[1.0, 1.0]] * 2}
    expected = functional.matryoshka_2d_loss(states, backend="reference", **options)
    with pytest.warns(UserWarning, match="m2d_ext has no kernels for this test; it uses its slower") as caught:
        results = [functional.matryoshka_2d_loss(states, **options) for _ in range(2)]
    assert len(caught) == 1
    assert all(torch.equal(result, expected) for result in results)
    with pytest.raises(RuntimeError, match=r"m2d_ext has no kernels for this test\."):
        functional.matryoshka_2d_loss(states, backend="fused", **options)
    traced = torch.compile(
        lambda: functional.matryoshka_2d_loss(states, **options), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(traced(), expected)
