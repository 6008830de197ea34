"""Whether the kernels are right on the GPU that is there: the tests, then compute-sanitizer. `make gpu-check` runs it.

Within 7 minutes, the build not included; what there was no time for is reported as not finished. Exit status 1 unless
all checks passed.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gpu_build import ROOT, Results, capability, environment, markdown_table

MINUTES = 7.0
SECONDS_OF_A_TOOL = 100.0  # at most, so that the others have their turn
REPEATS = 10_000
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
RESULT = {0: "passed", None: "not finished"}  # by exit status
TITLE = "m2d_ext on a GPU: tests and compute-sanitizer"


class Deadline:
    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def seconds(self) -> float:
        return max(0.0, self._end - time.monotonic())


def run(command: list[str], deadline: Deadline, at_most: float = math.inf, **options: Any) -> dict[str, Any]:
    """Its exit status, None where time was up, seconds and the end of its output."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command,
            timeout=min(at_most, deadline.seconds()),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            **options,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = None, error.output or b""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "output": output[-20_000:]}


def run_tests(build: Path, deadline: Deadline, arguments: list[str], **environ: str) -> dict[str, Any]:
    """pytest in the folder of the build, where nothing but that build can be imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *arguments]
    result = run(command, deadline, cwd=build, env={**environment(build), **environ})
    summary = re.findall(r"^.*\b(?:passed|failed|error|skipped)\b.* in [\d.]+s.*$", result["output"], re.MULTILINE)
    result["summary"] = summary[-1].strip("= ") if summary else "no summary: see the output"
    return result


def nvcc() -> str | None:
    return shutil.which("nvcc") or next((p for p in ["/usr/local/cuda/bin/nvcc"] if Path(p).exists()), None)


def compute_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next(
        (p for p in ["/usr/local/cuda/bin/compute-sanitizer"] if Path(p).exists()), None
    )


def sanitize(build: Path, deadline: Deadline) -> dict[str, dict[str, Any]]:
    """Each tool over a program without torch, and that program alone first."""
    compiler = nvcc()
    if compiler is None:
        return {"compile": {"status": None, "seconds": 0.0, "output": "", "summary": "nvcc is not installed"}}
    program = build.resolve() / "gpu_main"
    arch = f"sm_{capability().replace('.', '')}"
    sources = [str(ROOT / "tests" / "gpu_main.cu"), *sorted(map(str, (ROOT / "csrc" / "cuda").glob("*.cu")))]
    command = [compiler, "-std=c++20", "-O3", "-lineinfo", f"-arch={arch}", f"-I{ROOT / 'csrc'}", "--threads=0"]
    results = {"compile": run([*command, *sources, "-o", str(program)], deadline)}
    if results["compile"]["status"] == 0:
        results["plain run"] = run([str(program)], deadline)
        tool = compute_sanitizer()
        for name in TOOLS if tool else ():
            command = [str(tool), "--tool", name, "--error-exitcode", "9", str(program)]
            results[name] = run(command, deadline, SECONDS_OF_A_TOOL)
    for result in results.values():
        lines = result["output"].strip().splitlines()
        result["summary"] = "time was up" if result["status"] is None else lines[-1] if lines else ""
    if compute_sanitizer() is None:
        results["compute-sanitizer"] = {"status": None, "seconds": 0.0, "output": "", "summary": "not installed"}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, required=True, help="the folder of gpu_build.py")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("This needs a GPU and a CUDA build of torch.")

    deadline = Deadline(args.minutes)
    results = Results(args.results, "gpu-check")
    checks: dict[str, dict[str, Any]] = {}
    results.data["checks"] = checks

    def report(**new: dict[str, Any]) -> None:
        checks.update(new)
        for name, result in new.items():
            print(f"{name}: {result['summary']} ({result['seconds']} s)", flush=True)
            if result["status"] != 0:
                print(result["output"], flush=True)
        rows = [
            [name, RESULT.get(r["status"], "FAILED"), r["summary"].replace("|", "\\|"), f"{r['seconds']:.0f}"]
            for name, r in checks.items()
        ]
        results.sections = [markdown_table(["check", "result", "last line", "seconds"], rows)]
        results.write(TITLE)

    # The longest last, each before the next: a machine that is taken away has still told something.
    gpu_tests = ["tests/test_cuda.py"]
    report(cuda=run_tests(args.build, deadline, gpu_tests, M2D_TEST_DEVICE="cuda"))
    report(**sanitize(args.build, deadline))
    repeated = [*gpu_tests, "-k", "one_bit_pattern"]
    repeats = run_tests(args.build, deadline, repeated, M2D_TEST_DEVICE="cuda", M2D_REPEATS=str(REPEATS))
    report(repeats=repeats)
    report(cpu=run_tests(args.build, deadline, ["tests/test_functional.py", "tests/test_ops.py"]))
    raise SystemExit(0 if all(check["status"] == 0 for check in checks.values()) else 1)


if __name__ == "__main__":
    main()
