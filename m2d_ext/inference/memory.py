"""How much memory some work takes."""

import os
from pathlib import Path


class PeakMemory:
    """Growth of the resident set's peak (VmHWM), which the kernel is asked to forget at the start. Linux only.

    Unlike torch's own counters it sees every byte that was touched, also what kernels and libraries allocate.
    """

    FORGET = Path("/proc/self/clear_refs")

    def __init__(self) -> None:
        self.FORGET.write_text("5")
        self._start = self._status("VmRSS")

    @classmethod
    def is_available(cls) -> bool:
        return os.access(cls.FORGET, os.W_OK)

    def growth(self) -> int:
        return self._status("VmHWM") - self._start

    @staticmethod
    def _status(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"this kernel does not report {key}")
