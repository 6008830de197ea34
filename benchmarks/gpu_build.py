"""Builds m2d_ext for the GPU that is there, and what checks and measurements on a GPU share.

    python benchmarks/gpu_build.py --output build/gpu

The Python that runs this is the one whose torch is used; nothing is downloaded. The folder is then the place to run
from: it holds the compiled package and copies of the tests and benchmarks, no sources that could be imported instead.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def capability() -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability())


def command_output(*command: str) -> str | None:
    """None where the program is absent or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def revision() -> str:
    """Of the sources, "unknown" outside a repository; M2D_REVISION where they were copied out of one."""
    if given := os.environ.get("M2D_REVISION"):
        return given
    head = command_output("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    return f"{head} with changes" if command_output("git", "status", "--porcelain", "--", "csrc", "m2d_ext") else head


def facts() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    properties = torch.cuda.get_device_properties(0)
    driver = command_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "capability": capability(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "revision": revision(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


class Results:
    """A JSON file and a Markdown file, written anew with each result: what is there when time is up is kept."""

    def __init__(self, folder: Path, name: str) -> None:
        gpu = torch.cuda.get_device_name().lower().replace(" ", "-")
        self.path = folder / f"{name}-{gpu}.json"
        self.data: dict[str, Any] = facts()
        self.sections: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, title: str) -> None:
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")
        about = ", ".join(f"{key} {self.data[key]}" for key in ("gpu", "driver", "cuda", "torch", "revision", "date"))
        self.path.with_suffix(".md").write_text("\n\n".join([f"# {title}", about, *self.sections]) + "\n")


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def objects(output: Path) -> Path:
    """Where the build keeps what it compiled of csrc/."""
    temporary = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    return output.resolve() / "source" / "build" / temporary / "csrc"


def program_of_toolkit(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def compile_command(output: Path, source: Path, program: Path) -> list[str] | None:
    """For a program of `source` and the kernels as the build in `output` compiled them; None without nvcc."""
    nvcc = program_of_toolkit("nvcc")
    if nvcc is None:
        return None
    sources = [source]
    for kernels in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        compiled = objects(output) / "cuda" / f"{kernels.stem}.o"
        sources.append(compiled if compiled.exists() else kernels)
    command = [
        nvcc,
        "-std=c++20",
        "-O3",
        "-lineinfo",
        f"-arch=sm_{capability().replace('.', '')}",
        f"-I{ROOT / 'csrc'}",
    ]
    return [*command, *map(str, sources), "-o", str(program)]


def build(output: Path) -> float:
    """Seconds. What is up to date is not compiled again."""
    source = output / "source"
    source.mkdir(parents=True, exist_ok=True)
    for name in ("csrc", "m2d_ext", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copied = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        options = {"dirs_exist_ok": True} if (ROOT / name).is_dir() else {}
        copied(ROOT / name, source / name, **options)  # with their times, by which ninja tells what is new
    environ = {**os.environ, "M2D_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": capability()}
    environ["NVCC_APPEND_FLAGS"] = "-lineinfo"  # the same code, whose lines compute-sanitizer and profilers can name
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    command += ["--upgrade", "--target", str(output.resolve()), "."]
    start = time.monotonic()
    subprocess.run(command, cwd=source, env=environ, check=True)
    seconds = time.monotonic() - start
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, output / name, dirs_exist_ok=True)
    shutil.copy2(ROOT / "pyproject.toml", output)
    return seconds


def environment(output: Path) -> dict[str, str]:
    """For processes that are to import the build in that folder."""
    return {**os.environ, "PYTHONPATH": str(output.resolve()), "HF_HUB_OFFLINE": "1", "M2D_REVISION": revision()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    if not torch.cuda.is_available():
        raise SystemExit("This needs a GPU and a CUDA build of torch: `make cuda-link` builds without a GPU.")
    print(f"built for compute capability {capability()} in {build(output):.0f} s", flush=True)


if __name__ == "__main__":
    main()
