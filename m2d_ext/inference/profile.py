"""What cutting layers and dims saves on this machine."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from . import fields
from .grid import check_axis
from .memory import PeakMemory
from .truncate import fewest_layers, find_layers, layer_view

DEFAULT_WORDS = 64
DEFAULT_TEXTS = 128
BYTES_PER_DIM = 4  # float32, as encode returns


@dataclass(frozen=True)
class Profile:
    """Measured costs by number of layers.

    Args:
        layers: numbers of layers kept.
        texts_per_second: encoding batches, each.
        latency_ms: of encoding one text alone, each; median.
        parameter_bytes: of the cut model, each.
        peak_bytes: most memory that encoding the texts took above the level before, each: of the GPU, or on Linux of
            the process; None elsewhere.
        bytes_per_dim: of a vector in an index.
        batch_size: of the batches.
        machine: where it was measured.
    """

    layers: list[int]
    texts_per_second: list[float]
    latency_ms: list[float]
    parameter_bytes: list[int]
    peak_bytes: list[int] | None
    bytes_per_dim: int
    batch_size: int
    machine: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> "Profile":
        """What ``to_json`` gave. ValueError where it is no profile."""
        fields.check_object("profile", data, cls.__dataclass_fields__, cls.__dataclass_fields__)
        fields.check_counts("layers", data["layers"], least=0)
        for name in ("texts_per_second", "latency_ms", "parameter_bytes", "peak_bytes"):
            if name != "peak_bytes" or data[name] is not None:
                fields.check_numbers(name, data[name], len(data["layers"]), least=0)
        for name in ("bytes_per_dim", "batch_size"):
            fields.check_type(name, data[name], int)
        fields.check_type("machine", data["machine"], dict)
        return cls(**data)

    def write(self, path: str | Path) -> None:
        """As JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> "Profile":
        """What ``write`` wrote. ValueError where it is no profile."""
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is no profile: {error}") from error


def profile(
    model: SentenceTransformer,
    texts: Sequence[str] | None = None,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
    repeats: int = 5,
) -> Profile:
    """Measure how fast the model encodes when it is cut to fewer layers.

    Every round takes all numbers of layers in turn, so that what else happens on the machine meets all alike; the
    figures are medians over the rounds, after one that is not counted.

    Args:
        model: it is left as it is.
        texts: to encode; None: 128 of 64 words from its vocabulary.
        layers: numbers of layers to keep; None: 0, where the architecture can be without, up to all.
        batch_size: texts at a time.
        repeats: rounds.

    Returns:
        The ``Profile``.

    Raises:
        TypeError: layers that are not ints.
        ValueError: no texts, or numbers that are not positive; layers that are empty or repeated; what
            ``m2d_ext.truncate_model`` says.
    """
    if batch_size <= 0 or repeats <= 0:
        raise ValueError(f"batch_size and repeats must be positive, got {batch_size} and {repeats}")
    check_axis("layers", layers, least=0)
    texts = _some_texts(model) if texts is None else list(texts)
    if not texts:
        raise ValueError("texts must hold at least one text, got none")
    models = _cut_models(model, layers)
    layers = list(models)
    batches: dict[int, list[float]] = {number: [] for number in layers}
    singles: dict[int, list[float]] = {number: [] for number in layers}
    peaks: dict[int, list[int | None]] = {number: [] for number in layers}
    for _ in range(repeats + 1):
        for number, cut in models.items():
            peak = _peak_of(model)
            batches[number].append(_seconds(partial(cut.encode, texts, batch_size=batch_size)))
            peaks[number].append(peak())
            singles[number] += [_seconds(partial(cut.encode, text)) for text in texts[:8]]
    return Profile(
        layers=layers,
        texts_per_second=[len(texts) / statistics.median(batches[number][1:]) for number in layers],
        latency_ms=[1e3 * statistics.median(singles[number][len(texts[:8]) :]) for number in layers],
        parameter_bytes=[sum(p.numel() * p.element_size() for p in cut.parameters()) for cut in models.values()],
        peak_bytes=_largest(peaks.values()),
        bytes_per_dim=BYTES_PER_DIM,
        batch_size=batch_size,
        machine=_machine(model),
    )


def _cut_models(model: SentenceTransformer, layers: Sequence[int] | None) -> dict[int, SentenceTransformer]:
    if layers is None:
        layers = range(fewest_layers(model), len(find_layers(model[0].auto_model)[1]) + 1)
    return {number: layer_view(model, number).eval() for number in layers}


def _peak_of(model: SentenceTransformer) -> Callable[[], int | None]:
    """Starts to watch the memory; the result says how far it has risen since."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        return lambda: torch.cuda.max_memory_allocated(model.device) - before
    if model.device.type == "cpu" and PeakMemory.is_available():
        return PeakMemory().growth
    return lambda: None


def _largest(peaks: Iterable[Sequence[int | None]]) -> list[int] | None:
    """Of each, without the round that is not counted; None where nothing could be measured."""
    known = [[max(0, peak) for peak in each[1:] if peak is not None] for each in peaks]
    return [max(each) for each in known] if all(known) else None


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _some_texts(model: SentenceTransformer) -> list[str]:
    words = sorted(word for word in model.tokenizer.get_vocab() if word.isalnum() and word.isascii())
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (DEFAULT_TEXTS, DEFAULT_WORDS), generator=generator).tolist()
    return [" ".join(words[i] for i in row) for row in picks]


def _machine(model: SentenceTransformer) -> dict[str, Any]:
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else cpu_name()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}


def cpu_name() -> str:
    """The processor, as its maker names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
