"""Whether the kernels are right on the GPU that is there: tests and compute-sanitizer. `make gpu-check` runs it.

All checks run at the same time, and each is reported as it ends. Within 7 minutes, the build not included; what there
was no time for is reported as not finished. Exit status 1 unless all checks passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu_build import ROOT, Results, compile_command, environment, markdown_table, program_of_toolkit

MINUTES = 7.0
WORKERS = 8  # of each run of pytest, where pytest-xdist is installed
REPEATS = 10_000
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# In the order of the table.
CHECKS = ("cuda", "losses", "repeats", "cpu", "compile", "plain run", "compute-sanitizer", *TOOLS)
RESULT = {0: "passed", None: "not finished"}  # by exit status
TITLE = "m2d_ext on a GPU: tests and compute-sanitizer"


class Deadline:
    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    def seconds(self) -> float:
        return max(0.0, self._end - time.monotonic())


def run(command: list[str], deadline: Deadline, **options: Any) -> dict[str, Any]:
    """Its exit status, None where time was up, seconds, the end of its output and a line of that."""
    start = time.monotonic()
    # A file: at the end of a pipe one would wait for whatever a killed program leaves running.
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        try:
            done = subprocess.run(
                command, timeout=deadline.seconds(), stdout=file, stderr=subprocess.STDOUT, check=False, **options
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = None
        file.seek(0)
        output = file.read()
    lines = output.strip().splitlines()
    summary = "time was up" if status is None else lines[-1] if lines else ""
    seconds = round(time.monotonic() - start, 1)
    return {"status": status, "seconds": seconds, "output": output[-20_000:], "summary": summary}


def absent(what: str) -> dict[str, Any]:
    return {"status": None, "seconds": 0.0, "output": "", "summary": f"{what} is not installed"}


def run_tests(build: Path, deadline: Deadline, arguments: list[str], **environ: str) -> dict[str, Any]:
    """pytest in the folder of the build, where nothing but that build can be imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "--durations=5"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(WORKERS)]
    result = run([*command, *arguments], deadline, cwd=build, env={**environment(build), **environ})
    summary = re.findall(r"^.*\b(?:passed|failed|error|skipped)\b.* in [\d.]+s.*$", result["output"], re.MULTILINE)
    result["summary"] = summary[-1].strip("= ") if summary else "no summary: see the output"
    return result


def compile_checks(build: Path, program: Path, deadline: Deadline) -> dict[str, Any]:
    """tests/gpu_main.cu, with the kernels."""
    command = compile_command(build, ROOT / "tests" / "gpu_main.cu", program)
    return absent("nvcc") if command is None else run(command, deadline)


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
    lock = threading.Lock()

    def report(name: str, check: Callable[[], dict[str, Any]]) -> bool:
        result = check()
        with lock:
            print(f"{name}: {result['summary']} ({result['seconds']} s)", flush=True)
            if result["status"] != 0:
                print(result["output"], flush=True)
            checks[name] = result
            results.data["checks"] = {name: checks[name] for name in CHECKS if name in checks}
            rows = [
                [name, RESULT.get(r["status"], "FAILED"), r["summary"].replace("|", "\\|"), f"{r['seconds']:.0f}"]
                for name, r in results.data["checks"].items()
            ]
            results.sections = [markdown_table(["check", "result", "last line", "seconds"], rows)]
            results.write(TITLE)
        return result["status"] == 0

    gpu_tests = ["tests/test_cuda.py"]
    repeated = [*gpu_tests, "-k", "one_bit_pattern"]
    losses = [f"tests/test_{name}.py" for name in ("losses_on_device", "losses_parity", "gradient_caching")]
    cpu_tests = ["tests/test_functional.py", "tests/test_ops.py"]
    tests = partial(run_tests, args.build, deadline)
    program = args.build.resolve() / "gpu_main"
    with ThreadPoolExecutor(max_workers=len(CHECKS)) as pool:

        def start(name: str, check: Callable[..., dict[str, Any]], *arguments: Any, **options: Any) -> Future[bool]:
            return pool.submit(report, name, partial(check, *arguments, **options))

        started = [
            start("cuda", tests, gpu_tests, M2D_TEST_DEVICE="cuda"),
            start("losses", tests, losses, M2D_TEST_DEVICE="cuda"),
            start("repeats", tests, repeated, M2D_TEST_DEVICE="cuda", M2D_REPEATS=str(REPEATS)),
            start("cpu", tests, cpu_tests),
        ]
        # The program needs no torch, and so do the tools over it.
        if report("compile", partial(compile_checks, args.build, program, deadline)):
            started.append(start("plain run", run, [str(program)], deadline))
            sanitizer = program_of_toolkit("compute-sanitizer")
            if sanitizer is None:
                started.append(start("compute-sanitizer", absent, "compute-sanitizer"))
            else:
                for tool in TOOLS:
                    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", str(program)]
                    started.append(start(tool, run, command, deadline))
    raise SystemExit(0 if all(check.result() for check in started) and checks["compile"]["status"] == 0 else 1)


if __name__ == "__main__":
    main()
