"""What a session of benchmarks measured: kept in pytest-benchmark's JSON, read by the tables and the page."""

from __future__ import annotations

import platform
import statistics
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch

from m2d_ext.inference.profile import cpu_name
from measure import NUM_THREADS
from shapes import Shape


def machine() -> dict[str, Any]:
    """What figures depend on beside the code."""
    packages = ("m2d_ext", "torch", "sentence-transformers", "transformers")
    return {
        "cpu": cpu_name(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": NUM_THREADS,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What two processes measured of a provider; both notes where they differ, as compile modes do."""
    notes = dict.fromkeys([*one["note"].split(", "), other["note"]])
    return {
        "seconds": [*one["seconds"], *other["seconds"]],
        "page_faults": max(one["page_faults"], other["page_faults"]),
        "note": ", ".join(notes),
    }


@dataclass(frozen=True)
class Speed:
    """One problem under one allocator, as measure.py reports it."""

    other_cores: float  # kept busy by other processes meanwhile
    providers: dict[str, dict[str, Any]]

    def milliseconds(self, name: str) -> float | None:
        found = self.providers.get(name)
        return 1e3 * statistics.median(found["seconds"]) if found else None

    def ratio(self, name: str, to: str) -> float | None:
        """Median over the rounds of one provider's time to another's in the same round."""
        if name not in self.providers or to not in self.providers:
            return None
        return statistics.median(self._ratios(name, to))

    def quartiles(self, name: str, to: str) -> tuple[float, float]:
        """Between which half of those ratios lie."""
        low, _, high = statistics.quantiles(self._ratios(name, to), n=4)
        return low, high

    def joined(self, other: Speed) -> Speed:
        """The rounds of both, of the same providers."""
        providers = {name: _joined(measured, other.providers[name]) for name, measured in self.providers.items()}
        return Speed(max(self.other_cores, other.other_cores), providers)

    def _ratios(self, name: str, to: str) -> list[float]:
        pairs = zip(self.providers[name]["seconds"], self.providers[to]["seconds"], strict=True)
        return [a / b for a, b in pairs]


@dataclass
class Results:
    """Everything measured in this session, for the tables."""

    rounds: int
    speed: dict[tuple[Shape, str, str], Speed] = field(default_factory=dict)  # (shape, padding, allocator)
    peak_bytes: dict[Shape, dict[str, int]] = field(default_factory=dict)
    deferred: dict[tuple[Shape, str], Speed] = field(default_factory=dict)  # (shape, padding)
    steps: dict[str, Speed] = field(default_factory=dict)  # by kind of texts
    base_losses: dict[str, Speed] = field(default_factory=dict)
    growth: dict[str, Speed] = field(default_factory=dict)  # by axis; providers.growth_name of each
    machine: dict[str, Any] = field(default_factory=machine)

    def add(self, other: Results) -> None:
        """What another session measured on the same machine, with as many rounds."""
        for name in ("rounds", "machine"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"results of different {name}: {getattr(self, name)} and {getattr(other, name)}")
        for name in ("speed", "peak_bytes", "deferred", "steps", "base_losses", "growth"):
            getattr(self, name).update(getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        """Lists of (key, value) in place of dicts whose keys are no strings."""
        return {
            "rounds": self.rounds,
            "machine": self.machine,
            "peak_bytes": [[asdict(shape), peaks] for shape, peaks in self.peak_bytes.items()],
            "steps": {texts: asdict(speed) for texts, speed in self.steps.items()},
            "base_losses": {base: asdict(speed) for base, speed in self.base_losses.items()},
            "growth": {axis: asdict(speed) for axis, speed in self.growth.items()},
            "speed": [[asdict(shape), *key, asdict(speed)] for (shape, *key), speed in self.speed.items()],
            "deferred": [[asdict(shape), *key, asdict(speed)] for (shape, *key), speed in self.deferred.items()],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Results:
        return cls(
            rounds=data["rounds"],
            machine=data["machine"],
            peak_bytes={Shape.from_json(shape): peaks for shape, peaks in data["peak_bytes"]},
            steps={texts: Speed(**speed) for texts, speed in data["steps"].items()},
            base_losses={base: Speed(**speed) for base, speed in data["base_losses"].items()},
            growth={axis: Speed(**speed) for axis, speed in data["growth"].items()},
            speed={(Shape.from_json(shape), *key): Speed(**speed) for shape, *key, speed in data["speed"]},
            deferred={(Shape.from_json(shape), *key): Speed(**speed) for shape, *key, speed in data["deferred"]},
        )
