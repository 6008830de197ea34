"""A regression check for CI: ratios within one run against bounds, never a time by itself.

    make bench-check

The bounds are far from what a quiet machine shows (docs/benchmarks.md), as CI seldom is one; they catch what makes
the loss much slower, not a few percent. A problem that misses them is measured again, and fails when it always does.
How many operations a training step dispatches, which no neighbour disturbs, is held by tests/test_deferred.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from measure import in_own_process
from providers import FLOOR, OURS, OURS_ONE_DIM, SENTENCE_TRANSFORMERS
from results import Speed
from shapes import PADDINGS, SMALL

ATTEMPTS = 3
ROUNDS = 9
PROVIDERS = (OURS, OURS_ONE_DIM, SENTENCE_TRANSFORMERS, FLOOR)


class Bound(NamedTuple):
    """On the ratio of one provider's time to another's."""

    name: str
    to: str
    most: float

    def is_met(self, speed: Speed) -> bool:
        ratio = speed.ratio(self.name, self.to)
        return ratio is not None and ratio <= self.most


BOUNDS = (
    Bound(OURS, SENTENCE_TRANSFORMERS, 0.5),
    Bound(OURS, FLOOR, 2.5),
    Bound(OURS, OURS_ONE_DIM, 1.4),
)


def measured(padding: str) -> Iterator[Speed]:
    arguments = ["speed", "--shape", json.dumps(asdict(SMALL)), "--padding", padding, "--rounds", str(ROUNDS)]
    script = Path(__file__).with_name("measure.py")
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ATTEMPTS):
            yield Speed(**in_own_process(script, [*arguments, "--providers", *PROVIDERS], "resident", Path(folder)))


def check(padding: str, console: Console) -> bool:
    for speed in measured(padding):
        missed = [bound for bound in BOUNDS if not bound.is_met(speed)]
        for bound in BOUNDS:
            ratio = speed.ratio(bound.name, bound.to)
            verdict = "MISSED" if bound in missed else "ok"
            console.print(
                f"{SMALL}, padding {padding}: {bound.name} / {bound.to} = {ratio:.2f}, at most {bound.most}: {verdict}"
            )
        if not missed:
            return True
    return False


def main() -> None:
    console = Console()
    if not all(check(padding, console) for padding in PADDINGS):
        sys.exit("the loss has become slower beside what it is compared with")


if __name__ == "__main__":
    main()
