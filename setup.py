"""Builds the extension m2d_ext._C; everything static stands in pyproject.toml.

M2D_BUILD chooses what is compiled:
  auto  the default on Linux: cuda if nvcc and a CUDA build of torch are there, otherwise cpu
  cpu   the CPU kernels
  cuda  the CPU and the CUDA kernels, for TORCH_CUDA_ARCH_LIST or the default list below
  none  nothing, the default on macOS and Windows: the package then runs its PyTorch reference
M2D_SANITIZE=1 compiles with the address and undefined-behaviour sanitizers.
"""

import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import __version__ as setuptools_version
from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILDS = ("auto", "cpu", "cuda", "none")
MIN_TORCH = (2, 11)
CUDA_ARCHES = ("8.0", "9.0", "10.0", "12.0")
NVCC_FLAGS = ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden"]

# Commands that compile nothing and so must work where there is no torch. `dist_info` is not one of them:
# pip asks for the metadata before it downloads the dependencies, and "install torch first" should be said then.
TORCH_FREE = {"sdist", "egg_info", "clean"}
QUESTIONS = {"--version", "--name", "--help", "--help-commands"}
# What needs torch even beside one of TORCH_FREE. Other words there are options and their values.
COMPILING = {"bdist", "bdist_dumb", "bdist_egg", "bdist_rpm", "bdist_wheel", "build", "build_ext", "build_py"}
COMPILING |= {"develop", "dist_info", "editable_wheel", "install", "install_lib"}


def stop(sentence):
    """End the build with one sentence instead of a traceback."""
    raise SystemExit(f"m2d_ext: {sentence}")


def compiles(arguments):
    """Whether what stands after setup.py on the command line may compile something."""
    words = set(arguments)
    if not words or words & QUESTIONS:
        return False
    return bool(words & COMPILING) or not words & TORCH_FREE


def requested_build(environ, system):
    """The value of M2D_BUILD, or the platform's default."""
    requested = environ.get("M2D_BUILD") or ("auto" if system == "Linux" else "none")
    if requested not in BUILDS:
        stop(f"M2D_BUILD={requested!r} is unknown, choose one of {', '.join(BUILDS)}.")
    return requested


def resolve_build(requested, *, torch_version, torch_cuda, nvcc, cuda_sources):
    """Turn 'auto' into 'cpu' or 'cuda', and refuse a 'cuda' that cannot be built.

    Whether a GPU is visible is never asked: machines that build often have none.
    """
    if requested == "cuda" and torch_cuda is None:
        stop(
            f"M2D_BUILD=cuda needs a CUDA build of torch, but torch {torch_version} is installed: "
            "install a CUDA build of torch, or set M2D_BUILD=cpu."
        )
    if requested == "cuda" and nvcc is None:
        stop(
            f"M2D_BUILD=cuda needs nvcc: install the CUDA {torch_cuda} toolkit and set CUDA_HOME to it, "
            "or set M2D_BUILD=cpu."
        )
    if requested == "cuda" and not cuda_sources:
        stop("M2D_BUILD=cuda needs the CUDA sources, but csrc/cuda has none: set M2D_BUILD=cpu.")
    if requested == "auto":
        return "cuda" if torch_cuda is not None and nvcc is not None and cuda_sources else "cpu"
    return requested


def import_torch():
    """The torch that the extension will run with.

    Under pip's build isolation that is the torch of the environment pip installs into. Isolation hides it by
    PYTHONPATH alone, so the same interpreter without PYTHONPATH still tells where it would look for torch.
    """
    if importlib.util.find_spec("torch") is None:
        environ = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONNOUSERSITE"}}
        command = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.path))"]
        paths = json.loads(subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout)
        # At the end: the tools that isolation provides stay ahead of the environment's own.
        sys.path += [path for path in paths if path and path not in sys.path]
    if importlib.util.find_spec("torch") is None:
        stop(
            "the extension is compiled against the torch it will run with, but there is none: "
            "run `pip install torch`, then `pip install --no-build-isolation .` "
            "(M2D_BUILD=none installs without the extension)."
        )
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        stop(f"torch {torch.__version__} is too old: run `pip install 'torch>=2.11'` before installing m2d_ext.")
    return torch


def check_compiler(environ, system):
    """Stop where there is no compiler: torch takes $CXX, or c++. On Windows setuptools looks for MSVC by itself."""
    compiler = (shlex.split(environ.get("CXX", "")) or ["c++"])[0]
    if system != "Windows" and shutil.which(compiler) is None:
        stop(
            f"the extension needs a C++20 compiler, but there is no {compiler}: install one (such as g++), set CXX to "
            "the one to use, or set M2D_BUILD=none to install without the extension."
        )


def cuda_toolkit(guess):
    """The toolkit's folder: torch's guess, or else the usual one; None where neither is one.

    torch takes the folder above the nvcc on PATH, which may be a script that calls an nvcc elsewhere.
    """
    for home in (guess, "/usr/local/cuda"):
        if home and Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime.h").exists():
            return home
    return None


def cuda_arch_list(nvcc):
    """TORCH_CUDA_ARCH_LIST, or those of the default architectures that this nvcc knows, the last one also as PTX."""
    if arches := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return arches
    known = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    return ";".join(arch for arch in CUDA_ARCHES if f"compute_{arch.replace('.', '')}" in known) + "+PTX"


def compile_flags(torch, sanitize):
    """Flags for C++ and the linker. Never -march=native: a wheel must run on other machines than its builder."""
    # ninja compares command lines, and system headers are no dependencies to it: with the version in the command
    # line, objects compiled against another torch are compiled anew.
    cxx = [f"-DM2D_TORCH_VERSION={torch.__version__}"]
    if platform.system() == "Windows":
        return [*cxx, "/O2"], []
    # -isystem wins over torch's own -I for the same directory, which silences the warnings of torch's headers.
    from torch.utils.cpp_extension import include_paths

    for path in include_paths():
        cxx += ["-isystem", path]
    cxx += ["-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
    cxx += ["-Wall", "-Wextra", "-Wno-unused-parameter"]
    link = []
    if sanitize:
        link = ["-fsanitize=address,undefined"]
        cxx += [*link, "-fno-omit-frame-pointer", "-O1", "-g"]
    else:
        cxx += ["-O3", "-g0"]
    if platform.system() == "Linux":
        # at::parallel_for is a template that is only parallel when its caller is compiled with OpenMP. It is not
        # linked with OpenMP: the symbols resolve to the runtime that torch has loaded, whatever its file is called,
        # so that there is never a second one with a thread pool of its own.
        cxx.append("-fopenmp")
    return cxx, link


def write_config(package, config):
    """Record beside the extension what it was built with; m2d_ext/_extension.py compares it to what is running."""
    package.mkdir(parents=True, exist_ok=True)
    (package / "_build_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_build_ext(config):
    """Torch's BuildExtension, which uses ninja, with objects kept in one place and the build recorded."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        def run(self):
            # An editable install would compile in a temporary directory: everything, every time.
            build = self.get_finalized_command("build")
            suffix = "-sanitize" if os.environ.get("M2D_SANITIZE") == "1" else ""
            self.build_temp = os.path.join(
                build.build_base, f"temp.{build.plat_name}-{sys.implementation.cache_tag}{suffix}"
            )
            super().run()
            # Only now: where the compiler fails, an older extension keeps the record that belongs to it.
            write_config((ROOT if self.inplace else Path(self.build_lib)) / "m2d_ext", config)

    return BuildExt


class BuildPyNone(build_py):
    """Records M2D_BUILD=none, so that an extension left over from an earlier build is not loaded."""

    def run(self):
        super().run()
        write_config((ROOT if self.editable_mode else Path(self.build_lib)) / "m2d_ext", {"build": "none"})


def configure(requested):
    """The keyword arguments of setup() for the requested build."""
    if requested == "none":
        print("m2d_ext: M2D_BUILD=none, building without the extension")
        return {"cmdclass": {"build_py": BuildPyNone}}

    torch = import_torch()
    check_compiler(os.environ, platform.system())
    from torch.utils import cpp_extension

    def glob(pattern):
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))

    cpp_extension.CUDA_HOME = cuda_toolkit(cpp_extension.CUDA_HOME)
    nvcc = str(Path(cpp_extension.CUDA_HOME, "bin", "nvcc")) if cpp_extension.CUDA_HOME else None
    sources = glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")
    cuda_sources = glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp")
    build = resolve_build(
        requested,
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        nvcc=nvcc,
        cuda_sources=cuda_sources,
    )

    sanitize = os.environ.get("M2D_SANITIZE") == "1"
    cxx, link = compile_flags(torch, sanitize)
    options = {
        "name": "m2d_ext._C",
        "include_dirs": [str(ROOT / "csrc")],
        "depends": glob("csrc/**/*.h") + glob("csrc/**/*.cuh"),
        "extra_link_args": link,
    }
    arches = []
    if build == "cuda":
        os.environ["TORCH_CUDA_ARCH_LIST"] = arch_list = cuda_arch_list(nvcc)
        arches = arch_list.replace(" ", ";").split(";")
        extension = cpp_extension.CUDAExtension(
            sources=sources + cuda_sources,
            extra_compile_args={"cxx": cxx, "nvcc": NVCC_FLAGS},
            **options,
        )
    else:
        extension = cpp_extension.CppExtension(sources=sources, extra_compile_args={"cxx": cxx}, **options)

    config = {
        "build": build,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_arches": arches,
        "python": sys.implementation.cache_tag,
    }
    print(
        f"m2d_ext: building {build} (M2D_BUILD={requested}) against torch {torch.__version__}"
        + (f" for {' '.join(arches)}" if arches else "")
        + (" with sanitizers" if sanitize else "")
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": make_build_ext(config)}}


def main():
    if int(setuptools_version.split(".")[0]) < 77:
        stop(f"setuptools {setuptools_version} is too old to read pyproject.toml: run `pip install -U setuptools`.")
    requested = requested_build(os.environ, platform.system())
    setup(**(configure(requested) if compiles(sys.argv[1:]) else {}))


if __name__ == "__main__":
    main()
