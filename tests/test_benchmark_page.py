"""From what a session of benchmarks measured to the JSON, the page and its plots. Times are no test's affair."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import check  # noqa: E402
import report  # noqa: E402
from base_loss_providers import BASE_LOSSES, LIBRARIES, candidates  # noqa: E402
from deferred_providers import DEFERRED_PROVIDERS  # noqa: E402
from providers import GROWTH_PROVIDERS, OURS, PROVIDERS, SENTENCE_TRANSFORMERS, growth_name  # noqa: E402
from results import Results, Speed  # noqa: E402
from shapes import GROWTH, MORE_SHAPES, SMALL  # noqa: E402
from step_providers import STEP_PROVIDERS, TEXTS  # noqa: E402
from tables import tables  # noqa: E402


def speed(providers, seconds=(0.002, 0.004, 0.003)) -> Speed:
    found = {
        name: {"seconds": [(i + 1) * each for each in seconds], "page_faults": 0, "note": ""}
        for i, name in enumerate(providers)
    }
    return Speed(other_cores=0.0, providers=found)


def growth_of(axis: str) -> Speed:
    """Of which every value costs itself."""
    found = {
        growth_name(name, value): {"seconds": [value] * 3, "page_faults": 0, "note": ""}
        for name in GROWTH_PROVIDERS
        for value in GROWTH[axis]
    }
    return Speed(other_cores=0.0, providers=found)


@pytest.fixture
def results() -> Results:
    return Results(
        rounds=3,
        speed={(SMALL, "none", "resident"): speed(PROVIDERS)},
        peak_bytes={SMALL: {OURS: 1 << 20, SENTENCE_TRANSFORMERS: 2 << 20}},
        deferred={(SMALL, "half"): speed(DEFERRED_PROVIDERS)},
        steps={texts: speed(STEP_PROVIDERS) for texts in TEXTS},
        base_losses={base: speed(LIBRARIES) for base in BASE_LOSSES},
        growth={"layers": growth_of("layers")},
    )


def test_json_gives_the_same_results(results: Results) -> None:
    assert Results.from_json(json.loads(json.dumps(results.to_json()))) == results


def test_every_field_is_in_the_json(results: Results) -> None:
    assert set(results.to_json()) == {field.name for field in dataclasses.fields(Results)}


def test_sessions_are_joined(results: Results) -> None:
    other = dataclasses.replace(
        results, speed={(MORE_SHAPES[0], "half", "resident"): next(iter(results.speed.values()))}
    )
    whole = Results.from_json(results.to_json())
    whole.add(other)
    assert whole.speed == results.speed | other.speed
    assert dataclasses.replace(whole, speed=results.speed) == results
    with pytest.raises(ValueError, match="results of different rounds"):
        whole.add(dataclasses.replace(other, rounds=results.rounds + 1))


def test_rounds_of_processes_are_joined() -> None:
    """Each round's ratio stays that of its own process."""
    one, other = speed(PROVIDERS), dataclasses.replace(speed(PROVIDERS[:1], (0.001, 0.001)), other_cores=0.5)
    other.providers.update({name: one.providers[OURS] | {"seconds": [0.008, 0.008]} for name in PROVIDERS[1:]})
    one.providers[OURS]["note"] = "max-autotune"
    other.providers[OURS] |= {"note": "default", "page_faults": 3}
    both = one.joined(other)
    assert both.other_cores == 0.5
    assert both.providers[OURS]["seconds"] == [0.002, 0.004, 0.003, 0.001, 0.001]
    assert both.ratio(PROVIDERS[1], OURS) == 2.0  # of 2, 2, 2, 8, 8
    assert both.providers[OURS]["page_faults"] == 3
    assert both.joined(one).providers[OURS]["note"] == "max-autotune, default"


def test_page_has_every_table_and_the_growth(results: Results, tmp_path: Path) -> None:
    report.write(results, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert text.count("\n## ") == len(tables(results)) == 6
    assert "| hidden states | 2 → 25 | 12.50× | 12.50× |" in text
    assert (tmp_path / "images" / "growth.png").stat().st_size > 0


def test_markdown_is_the_table(results: Results) -> None:
    table = tables(results)[0]
    lines = report.markdown(table)
    assert lines[0] == f"{table.title}."
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(table.rows)


def test_ratios_are_within_a_round() -> None:
    found = Speed(0.0, {"a": {"seconds": [1.0, 4.0, 9.0]}, "b": {"seconds": [1.0, 2.0, 3.0]}})
    assert found.ratio("a", "b") == 2.0
    assert found.ratio("a", "missing") is None


@pytest.mark.parametrize(("ratio", "met"), [(0.4, True), (0.5, True), (0.6, False)])
def test_bound(ratio: float, met: bool) -> None:
    found = Speed(0.0, {"a": {"seconds": [ratio] * 3}, "b": {"seconds": [1.0] * 3}})
    assert check.Bound("a", "b", 0.5).is_met(found) is met


def test_check_measures_again_and_fails_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = speed((SENTENCE_TRANSFORMERS, "floor", "ours, one dim", OURS))  # ours takes four times the first one's time
    fast = speed((OURS, "ours, one dim", SENTENCE_TRANSFORMERS, "floor"), (0.002,) * 3)
    monkeypatch.setattr(check, "measured", lambda padding: iter([slow, slow, fast]))
    assert check.check("none", check.Console(quiet=True))
    monkeypatch.setattr(check, "measured", lambda padding: iter([slow, slow, slow]))
    assert not check.check("none", check.Console(quiet=True))


def test_growth_changes_one_thing() -> None:
    for axis, values in GROWTH.items():
        for shape, padding in values.values():
            changed = {
                field.name
                for field in dataclasses.fields(SMALL)
                if getattr(shape, field.name) != getattr(SMALL, field.name)
            }
            assert changed <= {axis}
            assert padding == "none" or axis == "padding"


def test_base_losses_are_fused_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from sentence_transformers.base.modules import Transformer

    import providers

    for name in ("forward", "get_embedding_dimension"):  # which the candidates change for good
        monkeypatch.setattr(Transformer, name, getattr(Transformer, name))
    shape = dataclasses.replace(SMALL, layers=3, batch=5, tokens=4, width=8, dims=(4, 8))
    for base in BASE_LOSSES:
        assert set(candidates(providers.make_inputs(shape, "half"), base)) == set(LIBRARIES)
