"""Tiny random SentenceTransformer models: real architectures, a few thousand parameters, nothing downloaded.

Weights are drawn with a standard deviation of 0.12. At the usual 0.02 a network this narrow hands nearly the same
vector from layer to layer, and a KL between layers would be too small to tell a right one from a wrong one. From 0.25
on, the encoder's own backward rounds so coarsely in float32 that nothing could be said of the loss.
"""

from __future__ import annotations

import copy
import functools
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights
from sentence_transformers.util import batch_to_device
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PretrainedConfig, PreTrainedTokenizerFast

# Where the models and their features are: `make gpu-check` runs the tests of the losses on the GPU too.
DEVICE = os.environ.get("M2D_TEST_DEVICE", "cpu")
ARCHITECTURES = ("bert", "mpnet", "modernbert", "qwen3")
HIDDEN = 32
NUM_LAYERS = 3
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NUM_WORDS = 95
VOCAB_SIZE = len(SPECIAL_TOKENS) + NUM_WORDS
MAX_LENGTH = 64
INITIALIZER_RANGE = 0.12
PAD_ID, CLS_ID, SEP_ID = (SPECIAL_TOKENS.index(token) for token in ("[PAD]", "[CLS]", "[SEP]"))


def word(index: int) -> str:
    return f"w{index % NUM_WORDS}"


def sentence(length: int, generator: torch.Generator) -> str:
    """`length` random words; 0 gives the empty text."""
    return " ".join(word(index) for index in torch.randint(NUM_WORDS, (length,), generator=generator).tolist())


def tiny_tokenizer(special_tokens: bool = True, padding_side: str = "right") -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *map(word, range(NUM_WORDS))))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special_tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS_ID), ("[SEP]", SEP_ID)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_LENGTH,
        padding_side=padding_side,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def bert_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    return transformers.BertConfig(
        **_encoder_sizes(hidden, num_layers), hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )


def mpnet_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    # MPNet counts positions from pad_token_id + 1, hence two more of them.
    sizes = _encoder_sizes(hidden, num_layers) | {"max_position_embeddings": MAX_LENGTH + 2}
    return transformers.MPNetConfig(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def modernbert_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    return transformers.ModernBertConfig(
        **_encoder_sizes(hidden, num_layers),
        initializer_cutoff_factor=2.0,
        # Short enough that the longest texts leave the local window.
        local_attention=8,
        global_attn_every_n_layers=2,
        cls_token_id=CLS_ID,
        sep_token_id=SEP_ID,
        bos_token_id=CLS_ID,
        eos_token_id=SEP_ID,
        attention_dropout=dropout,
        embedding_dropout=dropout,
        mlp_dropout=dropout,
    )


def qwen3_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    return transformers.Qwen3Config(
        **_encoder_sizes(hidden, num_layers),
        num_key_value_heads=1,
        head_dim=hidden // 2,
        bos_token_id=CLS_ID,
        eos_token_id=SEP_ID,
        attention_dropout=dropout,
    )


def distilbert_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    return transformers.DistilBertConfig(
        vocab_size=VOCAB_SIZE,
        dim=hidden,
        hidden_dim=2 * hidden,
        n_layers=num_layers,
        n_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=PAD_ID,
        dropout=dropout,
        attention_dropout=dropout,
    )


def _encoder_sizes(hidden: int, num_layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": INITIALIZER_RANGE,
        "pad_token_id": PAD_ID,
    }


CONFIGS = {
    "bert": bert_config,
    "mpnet": mpnet_config,
    "modernbert": modernbert_config,
    "qwen3": qwen3_config,
    "distilbert": distilbert_config,
}


def roberta_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    # As MPNet counts positions.
    sizes = _encoder_sizes(hidden, num_layers) | {"max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1}
    return transformers.RobertaConfig(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def xlm_roberta_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    sizes = _encoder_sizes(hidden, num_layers) | {"max_position_embeddings": MAX_LENGTH + 2, "type_vocab_size": 1}
    return transformers.XLMRobertaConfig(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def t5_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    return transformers.T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=hidden,
        d_kv=hidden // 2,
        d_ff=2 * hidden,
        num_layers=num_layers,
        num_heads=2,
        relative_attention_num_buckets=8,
        initializer_factor=1.0,
        pad_token_id=PAD_ID,
        eos_token_id=SEP_ID,
        dropout_rate=dropout,
    )


def gemma3_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    """As EmbeddingGemma's encoder: attention in both directions, of two kinds."""
    return transformers.Gemma3TextConfig(
        **_encoder_sizes(hidden, num_layers),
        num_key_value_heads=1,
        head_dim=hidden // 2,
        query_pre_attn_scalar=hidden // 2,
        sliding_window=8,
        layer_types=[("sliding_attention", "full_attention")[i % 2] for i in range(num_layers)],
        use_bidirectional_attention=True,
        bos_token_id=CLS_ID,
        eos_token_id=SEP_ID,
        attention_dropout=dropout,
    )


# Those that few tests need.
MORE_CONFIGS = {
    "roberta": roberta_config,
    "xlm-roberta": xlm_roberta_config,
    "t5": t5_config,
    "gemma3": gemma3_config,
}


def fnet_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    sizes = _encoder_sizes(hidden, num_layers)
    del sizes["num_attention_heads"]
    return transformers.FNetConfig(**sizes, hidden_dropout_prob=dropout)


def convbert_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    sizes = _encoder_sizes(hidden, num_layers) | {
        "embedding_size": hidden // 2,
        "head_ratio": 1,
        "conv_kernel_size": 3,
    }
    return transformers.ConvBertConfig(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def yoso_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    sizes = _encoder_sizes(hidden, num_layers) | {"use_expectation": True}
    return transformers.YosoConfig(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def nystromformer_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    sizes = _encoder_sizes(hidden, num_layers) | {"segment_means_seq_len": MAX_LENGTH, "num_landmarks": MAX_LENGTH}
    return transformers.NystromformerConfig(
        **sizes, conv_kernel_size=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )


# Whose states of a text depend on how far it is padded.
PADDING_CONFIGS = {
    "fnet": fnet_config,
    "convbert": convbert_config,
    "yoso": yoso_config,
    "nystromformer": nystromformer_config,
}


def funnel_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    return transformers.FunnelConfig(
        vocab_size=VOCAB_SIZE,
        d_model=hidden,
        n_head=2,
        d_head=hidden // 2,
        d_inner=2 * hidden,
        block_sizes=[1] * num_layers,
        num_decoder_layers=1,
        hidden_dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        architectures=["FunnelModel"],
    )


# Whose later states have fewer tokens.
SHORTENING_CONFIGS = {"funnel": funnel_config}


def longformer_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    sizes = _encoder_sizes(hidden, num_layers) | {"attention_window": [4] * num_layers}
    return transformers.LongformerConfig(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def deberta_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    sizes = _encoder_sizes(hidden, num_layers)
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return transformers.DebertaV2Config(**sizes, **relative, **dropouts)


def esm_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    sizes = _encoder_sizes(hidden, num_layers)
    return transformers.EsmConfig(**sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)


def mamba_config(hidden: int, num_layers: int, dropout: float) -> PretrainedConfig:
    del dropout  # it has none
    return transformers.MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=hidden, num_hidden_layers=num_layers, pad_token_id=0
    )


# What cannot be cut to every number of layers, or whose hidden states are not what a cut model returns.
CUT_CONFIGS = {"longformer": longformer_config, "deberta": deberta_config, "esm": esm_config, "mamba": mamba_config}

ALL_CONFIGS = CONFIGS | MORE_CONFIGS | PADDING_CONFIGS | SHORTENING_CONFIGS | CUT_CONFIGS


@functools.cache
def _transformer(
    architecture: str, left_padding: bool, hidden: int, num_layers: int, dropout: float, seed: int
) -> Transformer:
    tokenizer = tiny_tokenizer(
        special_tokens=architecture not in ("qwen3", "gemma3"), padding_side="left" if left_padding else "right"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ALL_CONFIGS[architecture](hidden, num_layers, dropout)
        model = transformers.AutoModel.from_config(config)
        _perturb_norms_and_biases(model)
    # The module only loads from a folder; a saved model is also what a user's own script would give it.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return Transformer(folder)


@torch.no_grad()
def _perturb_norms_and_biases(model: torch.nn.Module) -> None:
    """Ones and zeros hide mistakes: with them, a norm weight's gradient can be right by accident."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter += 0.1 * torch.randn_like(parameter)


def tiny_model(
    architecture: str = "bert",
    *,
    normalize: bool = False,
    pooling: str | Sequence[str] = "mean",
    include_prompt: bool = True,
    word_weights: bool = False,
    dense: int | None = None,
    left_padding: bool = False,
    hidden: int = HIDDEN,
    num_layers: int = NUM_LAYERS,
    dropout: float = 0.0,
    seed: int = 0,
) -> SentenceTransformer:
    """Transformer [-> WordWeights] -> Pooling [-> Dense of `dense` features] [-> Normalize], training, in float32.

    The same arguments give the same weights; every call gives its own copy. `hidden_states` has `num_layers + 1`
    entries.
    """
    transformer = copy.deepcopy(_transformer(architecture, left_padding, hidden, num_layers, dropout, seed))
    pooling_module = Pooling(hidden, pooling_mode=pooling, include_prompt=include_prompt)
    modules: list[torch.nn.Module] = [transformer, pooling_module]
    if word_weights:
        vocabulary = transformer.tokenizer.get_vocab()
        words = sorted(vocabulary, key=vocabulary.__getitem__)
        modules.insert(1, WordWeights(words, {word: 0.2 + 0.1 * (i % 17) for i, word in enumerate(words)}))
    if dense is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            modules.append(Dense(pooling_module.pooling_output_dimension, dense))
    if normalize:
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device=DEVICE).train()


def features_of(
    model: SentenceTransformer, columns: Sequence[Sequence[str]], **preprocess: Any
) -> list[dict[str, Any]]:
    """One feature dict per column, each padded to its own longest text, as the trainer's collator makes them."""
    made = [model.preprocess(list(column), **preprocess) for column in columns]
    return [batch_to_device(features, torch.device(DEVICE)) for features in made]
