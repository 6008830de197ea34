"""truncate_model: the first layers and dimensions of a model, as a plain SentenceTransformer."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import RepoCard
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, WeightedLayerPooling
from torch import Tensor
from torch.nn import functional as F

import m2d_ext
from m2d_ext.architecture import final_norm
from m2d_ext.inference.truncate import fewest_layers, layer_view, tried_view
from tiny_models import CONFIGS, HIDDEN, MORE_CONFIGS, sentence, tiny_model, tiny_tokenizer

LAYERS = 4
EVERY_ARCHITECTURE = [*CONFIGS, *MORE_CONFIGS]
TEXTS = [sentence(length, torch.Generator().manual_seed(7)) for length in (9, 3, 12, 1)]


@torch.no_grad()
def expected_rows(model: SentenceTransformer, layer: int, dim: int) -> Tensor:
    """Of one hidden state, by hand: the final norm, the mean over the tokens, what follows the pooling, the cut."""
    features = model.preprocess(TEXTS)
    encoder = model[0].auto_model
    inputs = {name: v for name, v in features.items() if name in ("input_ids", "attention_mask")}
    states = encoder(**inputs, output_hidden_states=True).hidden_states
    state = states[layer]
    norm = final_norm(model[0])
    if norm is not None and layer < LAYERS:
        state = norm(state)
    mask = features["attention_mask"][..., None]
    features["sentence_embedding"] = (state * mask).sum(1) / mask.sum(1)
    modules = [module for module in list(model.children())[2:] if type(module).__name__ != "Normalize"]
    for module in modules:
        features = module(features)
    rows = features["sentence_embedding"][:, :dim]
    return F.normalize(rows, dim=-1) if type(list(model.children())[-1]).__name__ == "Normalize" else rows


def encode(model: SentenceTransformer) -> Tensor:
    return model.encode(TEXTS, convert_to_tensor=True)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layers", range(LAYERS + 1))
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_the_rows_of_a_cell(architecture: str, layers: int, normalize: bool, tmp_path: Path) -> None:
    model = tiny_model(architecture, num_layers=LAYERS, normalize=normalize).double().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = copy.deepcopy(model[0].auto_model.config.to_dict())
    if (architecture, layers) == ("modernbert", 0):
        with pytest.raises(
            ValueError, match="ModernBertModel cannot be cut to 0 layers: it could not be loaded again"
        ):
            m2d_ext.truncate_model(model, num_layers=layers)
        return
    cut = m2d_ext.truncate_model(model, num_layers=layers, dim=8)
    torch.testing.assert_close(encode(cut), expected_rows(model, layers, 8), rtol=1e-9, atol=1e-12)
    assert cut.get_embedding_dimension() == 8
    # The original is what it was, and apart.
    assert model[0].auto_model.config.to_dict() == config
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert not own & {parameter.data_ptr() for parameter in cut.parameters()}
    # Saved and loaded.
    cut.float().save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(encode(loaded), encode(cut))
    said = loaded[0].auto_model.config.m2d_ext_cut
    assert said == {"num_layers": layers, "of_layers": LAYERS, "dim": 8, "of_dims": HIDDEN}
    assert f"first {layers} of {LAYERS} layers and 8 of {HIDDEN} dimensions" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("dense", [None, 24])
@pytest.mark.parametrize("pooling", ["mean", ("mean", "cls")])
@pytest.mark.parametrize("dim", [None, 5])
def test_modules_after_the_pooling(dim: int | None, pooling: Any, dense: int | None) -> None:
    model = tiny_model(normalize=True, pooling=pooling, dense=dense, num_layers=LAYERS).eval()
    cut = m2d_ext.truncate_model(model, num_layers=LAYERS, dim=dim)
    width = model.get_embedding_dimension()
    assert width is not None
    torch.testing.assert_close(encode(cut), F.normalize(encode(model)[:, : dim or width], dim=-1))
    assert len(cut) == len(model) + (dim is not None)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dim", [None, 5])
def test_a_model_with_a_truncate_dim(dim: int | None, normalize: bool, tmp_path: Path) -> None:
    model = tiny_model(normalize=normalize, num_layers=LAYERS).eval()
    model.truncate_dim = 12
    cut = m2d_ext.truncate_model(model, 2, dim)
    torch.testing.assert_close(encode(cut), expected_rows(model, 2, dim or 12))
    assert cut.get_embedding_dimension() == (dim or 12)
    assert cut[0].auto_model.config.m2d_ext_cut["of_dims"] == HIDDEN
    assert model.truncate_dim == 12
    cut.save_pretrained(str(tmp_path))
    assert torch.equal(encode(SentenceTransformer(str(tmp_path), device="cpu")), encode(cut))
    with pytest.raises(ValueError, match="dim must be from 1 to 12 for this model, got 13"):
        m2d_ext.truncate_model(model, 2, 13)


def test_fewer_parameters() -> None:
    model = tiny_model(num_layers=LAYERS)
    sizes = [sum(p.numel() for p in m2d_ext.truncate_model(model, n).parameters()) for n in range(LAYERS + 1)]
    steps = [b - a for a, b in itertools.pairwise(sizes)]
    assert len(set(steps)) == 1
    assert steps[0] > 0
    assert sizes[-1] == sum(p.numel() for p in model.parameters())


def test_a_cut_model_can_be_cut_again_and_trained() -> None:
    model = tiny_model(num_layers=LAYERS, normalize=True).eval()
    twice = m2d_ext.truncate_model(m2d_ext.truncate_model(model, 3, 16), 2, 8)
    torch.testing.assert_close(encode(twice), encode(m2d_ext.truncate_model(model, 2, 8)))
    twice(twice.preprocess(TEXTS))["sentence_embedding"].sum().backward()


def test_loads_without_m2d_ext(tmp_path: Path) -> None:
    cut = m2d_ext.truncate_model(tiny_model("modernbert", num_layers=LAYERS, normalize=True).eval(), 2, 8)
    cut.save_pretrained(str(tmp_path / "model"))
    torch.save(encode(cut), tmp_path / "expected.pt")
    script = f"""
import sys
sys.modules["m2d_ext"] = None
import torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(tmp_path / "model")!r}, device="cpu")
found = model.encode({TEXTS!r}, convert_to_tensor=True)
assert torch.equal(found, torch.load({str(tmp_path / "expected.pt")!r})), "other vectors"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


README = """---
language:
- en
license: mit
datasets:
- snli
tags:
- sentence-transformers
- wordy
---

# wordy-model

It maps texts to 32 dimensions.
"""


@pytest.mark.parametrize(
    ("readme", "name"),
    [
        (README, "wordy-model"),
        (README.replace("# wordy-model", "A model."), "start"),
        (README.replace("language:", "language: ["), "start"),
        ("No head.", "start"),
    ],
)
def test_the_card_says_what_was_cut_and_keeps_the_metadata(tmp_path: Path, readme: str, name: str) -> None:
    tiny_model(num_layers=LAYERS, normalize=True).eval().save_pretrained(str(tmp_path / "start"))
    (tmp_path / "start" / "README.md").write_text(readme)
    model = SentenceTransformer(str(tmp_path / "start"), device="cpu")
    m2d_ext.truncate_model(model, 2, 8).save_pretrained(str(tmp_path / "cut"))
    card = RepoCard((tmp_path / "cut" / "README.md").read_text())
    assert f"# {name}, cut to the first 2 of {LAYERS} layers and 8 of {HIDDEN} dimensions" in card.text
    assert "8-dimensional" in card.text
    assert "It maps texts to 32 dimensions" not in card.text
    said = card.data.to_dict()
    assert {"matryoshka", "m2d_ext"} <= set(said["tags"])
    if readme.startswith("---") and "[" not in readme:
        assert (said["language"], said["license"], said["datasets"]) == (["en"], "mit", ["snli"])
        assert "wordy" in said["tags"]
    # The original's is what it was.
    model.save_pretrained(str(tmp_path / "again"))
    assert (tmp_path / "again" / "README.md").read_text() == readme


def test_the_card_has_no_scores_of_the_whole_model(tmp_path: Path) -> None:
    model = tiny_model(num_layers=LAYERS).eval()
    EmbeddingSimilarityEvaluator(TEXTS, TEXTS[::-1], [0.1, 0.5, 0.2, 0.9], name="whole")(model)
    cards = {"whole": model, "cut": m2d_ext.truncate_model(model, 2)}
    for name, each in cards.items():
        each.save_pretrained(str(tmp_path / name))
        text = (tmp_path / name / "README.md").read_text()
        assert ("## Evaluation" in text, "model-index" in text) == (name == "whole",) * 2


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_layers": LAYERS + 1}, ValueError, f"num_layers must be from 0 to {LAYERS} for this model, got 5"),
    ({"num_layers": -1}, ValueError, "num_layers must be from 0"),
    ({"num_layers": 2.0}, TypeError, "num_layers must be an int or None, got float"),
    ({"dim": HIDDEN + 1}, ValueError, f"dim must be from 1 to {HIDDEN} for this model, got 33"),
    ({"dim": 0}, ValueError, "dim must be from 1"),
    ({"dim": True}, TypeError, "dim must be an int or None, got bool"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_numbers(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        m2d_ext.truncate_model(tiny_model(num_layers=LAYERS), **options)


def test_what_a_configuration_lists_per_layer(tmp_path: Path) -> None:
    cut = m2d_ext.truncate_model(tiny_model("longformer", num_layers=LAYERS).eval(), 2)
    assert cut[0].auto_model.config.attention_window == [4, 4]
    cut.save_pretrained(str(tmp_path))
    assert torch.equal(encode(SentenceTransformer(str(tmp_path), device="cpu")), encode(cut))


def test_what_cannot_be_cut_is_refused() -> None:
    for architecture, layers, reason in (
        ("deberta", 0, "it could not be run: "),
        ("esm", 2, "it could not be loaded again: its configuration asks for a contact_head.regression.weight"),
    ):
        model = tiny_model(architecture)
        with pytest.raises(ValueError, match=f"cannot be cut to {layers} layers: {reason}"):
            m2d_ext.truncate_model(model, layers)
    assert m2d_ext.truncate_model(tiny_model("deberta"), 1).training
    encoder = tiny_model()[0]
    encoder.auto_model.config.output_hidden_states = True
    modules = [encoder, WeightedLayerPooling(HIDDEN, num_hidden_layers=3, layer_start=1), Pooling(HIDDEN)]
    with pytest.raises(ValueError, match="cannot be cut to 2 layers: it could not be run: The expanded size"):
        m2d_ext.truncate_model(SentenceTransformer(modules=modules, device="cpu"), 2)


def test_module_names_with_a_gap() -> None:
    """As where one was taken out of modules.json."""
    model = tiny_model(normalize=True)
    normalize = model._modules.pop("2")
    model.add_module("3", normalize)
    cut = m2d_ext.truncate_model(model, 2, 16)
    assert [type(module).__name__ for module in cut.children()] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert encode(cut).shape[1] == 16


def test_a_view_has_the_models_own_parameters() -> None:
    model = tiny_model(num_layers=LAYERS).eval()
    view = layer_view(model, 2)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in view.parameters()} < own
    assert torch.equal(encode(view), encode(m2d_ext.truncate_model(model, 2)))
    view.train()
    assert not any(module.training for module in model.modules())
    assert len(model[0].auto_model.encoder.layer) == LAYERS


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
@pytest.mark.parametrize("kind", ["adapters", "compiled", "not to be copied"])
def test_what_cannot_be_tried_is_graded_as_before(kind: str, architecture: str) -> None:
    """Whether there is a layer 0 is then asked of the configuration alone."""
    model = tiny_model(architecture)
    if kind == "adapters":
        model.add_adapter(peft.LoraConfig(target_modules=["query" if architecture == "bert" else "Wqkv"], r=2))
    elif kind == "compiled":
        model.compile(backend="eager")
    else:
        model[0].auto_model.lock = threading.Lock()
    assert tried_view(model, 1) is None
    assert fewest_layers(model) == (0 if architecture == "bert" else 1)


def test_running_out_of_memory_says_nothing_of_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(SentenceTransformer, "encode", encode)
    with pytest.raises(torch.OutOfMemoryError):
        fewest_layers(tiny_model())


def test_a_view_is_no_cut_to_tell_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="m2d_ext"):
        layer_view(tiny_model(), 1)
        assert not caplog.records
        m2d_ext.truncate_model(tiny_model(), 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"Kept the first 1 of 3 layers and {HIDDEN} of {HIDDEN} dimensions."
    ]


def test_bad_models() -> None:
    with pytest.raises(TypeError, match="model must be a SentenceTransformer, got Linear"):
        m2d_ext.truncate_model(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    static = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(), embedding_dim=4)], device="cpu")
    with pytest.raises(ValueError, match="must start with a Transformer, got StaticEmbedding"):
        m2d_ext.truncate_model(static)
    with pytest.raises(ValueError, match="must not be compiled"):
        m2d_ext.truncate_model(torch.compile(tiny_model()))  # type: ignore[arg-type]
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(ValueError, match=r"must have no adapters: load it without them, and then model\[0\].model = "):
        m2d_ext.truncate_model(model, 2)
    model = tiny_model()
    model[0].auto_model.encoder.layer = torch.nn.ModuleList([*model[0].auto_model.encoder.layer, torch.nn.Identity()])
    with pytest.raises(ValueError, match="must have one list of 3 layers, as its configuration counts them"):
        m2d_ext.truncate_model(model, 2)
