"""Texts one after another without padding, as sentence-transformers gives them to flash attention.

Qwen3 tells packed texts apart by their positions under any attention, so that no flash attention is needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sentence_transformers
import torch
import transformers
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as st_losses
from torch import nn
from transformers import DataCollatorWithFlattening

import m2d_ext
import parity
from m2d_ext.pooling import MODES
from tiny_models import HIDDEN, sentence, tiny_model

pytestmark = pytest.mark.skipif(
    Version(sentence_transformers.__version__) < Version("6.2") or Version(transformers.__version__) < Version("5.23"),
    reason="older ones let packed texts attend to each other where there is no flash attention",
)

DIMS = [HIDDEN, 16, 4]
LENGTHS = ((1, 9, 4, 6), (7, 2, 5, 3), (3, 3, 8, 1))
ALL_CELLS: dict[str, Any] = {"n_layers_per_step": -1, "n_dims_per_step": -1}
FLATTEN_KEYS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
FLOAT64_TOLERANCE = 1e-10


def texts_of(lengths: Sequence[Sequence[int]] = LENGTHS) -> list[list[str]]:
    generator = torch.Generator().manual_seed(3)
    return [[sentence(length, generator) for length in column] for column in lengths]


def packed_features(model: SentenceTransformer, prompt_lengths: Sequence[int | None]) -> list[dict[str, Any]]:
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True)
    columns = []
    for texts, prompt_length in zip(texts_of(), prompt_lengths, strict=False):
        column = collate([{"input_ids": ids} for ids in model.tokenizer(texts)["input_ids"]])
        column.pop("labels", None)
        column["modality"] = "text"
        if prompt_length is not None:
            column["prompt_length"] = prompt_length
        columns.append(dict(column))
    return columns


def builder(prompt_lengths: Sequence[int | None] = (None,) * 3) -> Callable[[SentenceTransformer], Any]:
    def build(model: SentenceTransformer) -> list[dict[str, Any]]:
        params = model[0].model_forward_params
        if params is not None:
            model[0].model_forward_params = params | FLATTEN_KEYS
        return packed_features(model, prompt_lengths)

    return build


def loss_builder(library: Any, name: str, base: str, **options: Any) -> Callable[[SentenceTransformer], nn.Module]:
    def build(model: SentenceTransformer) -> nn.Module:
        inner = getattr(st_losses, base)(model)
        if name == "AdaptiveLayerLoss":
            return library.AdaptiveLayerLoss(model, inner, n_layers_per_step=-1, **options)
        every = ALL_CELLS if name == "Matryoshka2dLoss" else {}
        return getattr(library, name)(model, inner, DIMS, **every, **options)

    return build


@pytest.mark.parametrize("name", ["MatryoshkaLoss", "AdaptiveLayerLoss", "Matryoshka2dLoss"])
@pytest.mark.parametrize("prompt_lengths", [(None, None, None), (2, None, 1)], ids=["whole", "prompts"])
@pytest.mark.parametrize("pooling", [*MODES, ("mean", "lasttoken")], ids=str)
def test_equal_to_sentence_transformers(
    pooling: str | tuple[str, ...], prompt_lengths: tuple[int | None, ...], name: str
) -> None:
    include_prompt = prompt_lengths[0] is None
    if pooling == "max" and not include_prompt:
        pytest.skip("sentence-transformers gives -inf to a text that is all prompt")
    model = tiny_model("qwen3", pooling=pooling, include_prompt=include_prompt).double()
    comparison = parity.compare(
        model,
        loss_builder(m2d_ext, name, "MultipleNegativesRankingLoss"),
        loss_builder(st_losses, name, "MultipleNegativesRankingLoss"),
        builder(prompt_lengths),
        dtype=torch.float64,
        tolerance=FLOAT64_TOLERANCE,
    )
    assert comparison.fallbacks == ()


@pytest.mark.parametrize("base", ["CoSENTLoss", "MultipleNegativesSymmetricRankingLoss"])
def test_other_base_losses(base: str) -> None:
    comparison = parity.compare(
        tiny_model("qwen3", normalize=True).double(),
        loss_builder(m2d_ext, "Matryoshka2dLoss", base),
        loss_builder(st_losses, "Matryoshka2dLoss", base),
        builder(),
        labels=torch.tensor([0.1, 0.9, 0.4, 0.7]),
        dtype=torch.float64,
        tolerance=FLOAT64_TOLERANCE,
    )
    assert comparison.fallbacks == ()


@pytest.mark.parametrize(
    "options", [{"mini_batch_size": 3}, {"mini_batch_num_tokens": 9}, {"deferred": False}], ids=str
)
@pytest.mark.parametrize("prompt_lengths", [(None, None, None), (2, None, 1)], ids=["whole", "prompts"])
def test_cached_and_dense(prompt_lengths: tuple[int | None, ...], options: dict[str, Any]) -> None:
    model = tiny_model("qwen3", include_prompt=prompt_lengths[0] is None).double()
    comparison = parity.compare(
        model,
        loss_builder(m2d_ext, "Matryoshka2dLoss", "MultipleNegativesRankingLoss", **options),
        loss_builder(st_losses, "Matryoshka2dLoss", "MultipleNegativesRankingLoss"),
        builder(prompt_lengths),
        dtype=torch.float64,
        tolerance=FLOAT64_TOLERANCE,
    )
    assert comparison.fallbacks == ()


def test_one_call_and_deferred_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of any length share a call, and the encoder's own states take the earlier layers' gradients."""
    if m2d_ext.build_info()["build"] == "none":
        pytest.skip("no extension")
    calls: list[tuple[int, ...]] = []
    model = tiny_model("qwen3")
    features = builder()(model)
    forward = model[0].auto_model.forward

    def recorded(**inputs: Any) -> Any:
        calls.append(tuple(inputs["input_ids"].shape))
        return forward(**inputs)

    monkeypatch.setattr(model[0].auto_model, "forward", recorded)
    with parity.recorded_dense_gradients() as dense:
        loss_builder(m2d_ext, "Matryoshka2dLoss", "MultipleNegativesRankingLoss")(model)(features, None).backward()
    assert calls == [(1, sum(map(sum, LENGTHS)))]
    assert dense == [1]


def test_packed_beside_padded_columns_take_the_loop() -> None:
    model = tiny_model("qwen3")
    features = [builder()(model)[0], model.preprocess(texts_of()[1])]
    loss = loss_builder(m2d_ext, "Matryoshka2dLoss", "MultipleNegativesRankingLoss")(model)
    with parity.recorded_fallbacks() as lines:
        loss(features, None).backward()
    assert "packed and padded columns" in lines[0]
