"""From feature dicts to hidden states: which are asked of the model, and in how many calls."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from sentence_transformers.base.losses.merged_forward import merge_feature_batches
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, WordWeights
from torch import Tensor, nn

from .. import functional
from ..arguments import Tokens, check_offsets
from ..pooling import packed_coefficients, padded_coefficients
from ..reference import accumulate_dtype

Features = dict[str, Any]

# Whether an encoder can be asked for some of its hidden states.
TAKES_LISTS_OF_STATES = Version(transformers.__version__) >= Version("5.23")

# Columns share a call where padding them to one width adds at most so many tokens on the CPU: what a call costs beside
# its tokens (benchmarks/merged_columns.py). On a GPU, where that is mostly launches, at most this share of tokens.
MERGED_TOKENS = 50
MERGED_SHARE = 0.1

# Types of encoders whose states of a text depend on how far it is padded, whatever the attention mask says: they mix,
# convolve or hash all positions, lay blocks of them, or read the next one's embedding. Their columns share a call only
# where they are of one width.
PADDING_SENSITIVE = frozenset(
    {"big_bird", "bigbird_pegasus", "convbert", "fnet", "mobilebert", "nystromformer", "reformer", "yoso"}
)


@contextmanager
def replaced_forward(module: Any, forward: Any) -> Iterator[None]:
    """``module.forward = forward`` for the duration of the block."""
    before = vars(module).get("forward")
    try:
        module.forward = forward
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def replaced_forwards(model: Any, forwards: dict[nn.Module, Callable[..., Features]]) -> Iterator[None]:
    """Let modules of a model have these forwards, and a WordWeights one that weighs coefficients, not tokens."""
    with ExitStack() as stack:
        for module in model.children():
            if isinstance(module, WordWeights):
                stack.enter_context(replaced_forward(module, _bound(_note_token_weights, module)))
            elif module in forwards:
                stack.enter_context(replaced_forward(module, forwards[module]))
        yield


@lru_cache(maxsize=64)
def _bound(function: Callable[..., Features], *arguments: Any) -> Callable[..., Features]:
    """``partial(function, *arguments)``, the same object every time: torch.compile would compile anew for another."""
    return partial(function, *arguments)


@contextmanager
def returned_states(model: Any, wanted: bool | list[int]) -> Iterator[None]:
    """Let the encoder return every layer's hidden states, or those of some, and leave its configuration as it was.

    A list gives None in place of the others; before transformers 5.23, it gives all of them.
    """
    if isinstance(wanted, list) and not TAKES_LISTS_OF_STATES:
        wanted = True
    config = model[0].auto_model.config
    before = config.output_hidden_states
    try:
        config.output_hidden_states = wanted
        yield
    finally:
        config.output_hidden_states = before


def embed(
    wrapper: nn.Module,
    model: Any,
    batches: Sequence[Features],
    earlier: Sequence[int] | None,
    norm: nn.Module | None = None,
) -> tuple[Tokens, int]:
    """Call the model on feature batches, and take the hidden states.

    Args:
        wrapper: what is called: the model itself, or what wraps it.
        model: the SentenceTransformer: Transformer, perhaps WordWeights, Pooling, perhaps Normalize. Of those that are
            not the first, only WordWeights does anything.
        batches: feature dicts, which are left as they are.
        earlier: indices of the earlier hidden states that are wanted, ascending; None: all.
        norm: what the earlier states pass through.

    Returns:
        The hidden states, one block per batch, the final one last and as the encoder's own output, with the
        coefficients of the model's ``Pooling``; and how many states the encoder has.

    Raises:
        RuntimeError: the encoder did not return a state that it was asked for, or has too few.
    """
    outputs = _call(wrapper, model, batches, earlier, dict.fromkeys(list(model.children())[1:], _pass_on))
    states = [_states(output, earlier, norm) for output in outputs]
    pooling = pooling_of(model)
    return _tokens(states, outputs, pooling, pooling.pooling_mode), _num_states(outputs[0])


def embed_rows(
    wrapper: nn.Module,
    model: Any,
    batches: Sequence[Features],
    earlier: Sequence[int] | None,
    norm: nn.Module | None = None,
    deferred: bool = False,
) -> tuple[Tensor, int]:
    """Call the model on feature batches, and take the rows of all layers after all of its modules but Normalize.

    Modules after the pooling run once, on the rows of all layers together, and inside the wrapper, which may look for
    the parameters that a call used.

    Args:
        wrapper: as in ``embed``, and so are the next four.
        model: Transformer, perhaps WordWeights, Pooling, and then modules that work on rows.
        batches: as there.
        earlier: as there.
        norm: as there.
        deferred: whether the gradients of earlier layers may be deferred (``m2d_ext.deferred``).

    Returns:
        (L, N, D) in the accumulation dtype, and how many hidden states the encoder has. D is what the modules make of
        it: several modes' widths together, or a Dense's. A Normalize that follows nothing but Pooling is left out.
    """
    if not transforms_rows(model):
        tokens, num_states = embed(wrapper, model, batches, earlier, norm)
        return functional.pool_of_tokens(tokens, deferred=deferred), num_states
    pooling = pooling_of(model)
    pool = _bound(pool_all_layers, pooling, None if earlier is None else tuple(earlier), norm, deferred)
    outputs = _call(wrapper, model, batches, earlier, {pooling: pool})
    num_states = _num_states(outputs[0])
    layers = num_states if earlier is None else len(earlier) + 1
    rows = torch.cat([output["sentence_embedding"] for output in outputs]).unflatten(0, (-1, layers)).movedim(1, 0)
    return rows.to(accumulate_dtype(rows.dtype)), num_states


def transforms_rows(model: Any) -> bool:
    """Whether rows are more than one mode's pooling of hidden states, normalised or not."""
    is_one_mode = isinstance(pooling_of(model).pooling_mode, str)
    return not is_one_mode or any(not isinstance(module, Normalize) for module in after_pooling(model))


def pooling_of(model: Any) -> Any:
    """The model's Pooling."""
    return next(module for module in model.children() if isinstance(module, Pooling))


def after_pooling(model: Any) -> list[nn.Module]:
    """The modules that follow the model's Pooling."""
    modules = list(model.children())
    return modules[modules.index(pooling_of(model)) + 1 :]


def select_layers(rows: Tensor, layers: Sequence[int]) -> Tensor:
    """``rows[layers]``, the rows themselves where that is all of them."""
    return rows if len(layers) == len(rows) else rows[list(layers)]


def _call(
    wrapper: nn.Module,
    model: Any,
    batches: Sequence[Features],
    earlier: Sequence[int] | None,
    forwards: dict[nn.Module, Callable[..., Features]],
) -> list[Features]:
    """The model's outputs, the wanted hidden states among them, with the forwards of some modules replaced."""
    with ExitStack() as stack:
        if earlier is None:
            stack.enter_context(returned_states(model, True))
        elif earlier:
            stack.enter_context(returned_states(model, list(earlier)))
        stack.enter_context(replaced_forwards(model, forwards))
        # Copies: the modules write their outputs into the dicts, and the caller's would keep all states alive.
        return [wrapper(dict(batch)) for batch in batches]


def pool_all_layers(
    pooling: Any,
    earlier: Sequence[int] | None,
    norm: nn.Module | None,
    deferred: bool,
    features: Features,
    **_: Any,
) -> Features:
    """A Pooling's forward that returns the rows of all wanted layers, (n * L, D), as one batch of embeddings.

    Text by text: what DataParallel's replicas return is joined along the texts.
    """
    states = _states(features, earlier, norm)
    modes = (pooling.pooling_mode,) if isinstance(pooling.pooling_mode, str) else pooling.pooling_mode
    tables = [_tokens([states], [features], pooling, mode) for mode in modes]
    rows = torch.cat([functional.pool_of_tokens(tokens, deferred=deferred) for tokens in tables], dim=-1)
    features["sentence_embedding"] = rows.movedim(0, 1).flatten(0, 1).to(tables[0].states[0].dtype)
    return features


def _num_states(output: Features) -> int:
    """How many hidden states the encoder returned; one without layers returns none, and is its final state's."""
    return max(1, len(output.get("all_layer_embeddings", ())))


def _note_token_weights(word_weights: Any, features: Features, **_: Any) -> Features:
    """A WordWeights' forward that leaves the tokens as they are and notes what they weigh, the same in every layer."""
    tokens = features["token_embeddings"]
    ones = tokens.new_ones(()).expand(*tokens.shape[:-1], 1)
    weighed = type(word_weights).forward(word_weights, {**features, "token_embeddings": ones})
    features["token_weights"] = weighed["token_embeddings"].squeeze(-1)
    features["token_weights_sum"] = weighed["token_weights_sum"]
    return features


def _pass_on(features: Features, **_: Any) -> Features:
    """A module's forward that does nothing: the loss pools by itself."""
    return features


def _states(output: Features, earlier: Sequence[int] | None, norm: nn.Module | None) -> list[Tensor]:
    final = output["token_embeddings"]
    if (earlier is None or earlier) and "all_layer_embeddings" not in output:
        raise RuntimeError(
            "the encoder returned no hidden states, though its output_hidden_states asks for them: there are no "
            "earlier layers to train"
        )
    num_earlier = _num_states(output) - 1
    earlier = range(num_earlier) if earlier is None else earlier
    if any(layer >= num_earlier for layer in earlier):
        raise RuntimeError(f"the encoder returned {num_earlier + 1} hidden states, too few for layers {list(earlier)}")
    states = [output["all_layer_embeddings"][layer] for layer in earlier]
    if any(state is None for state in states):
        raise RuntimeError("the encoder did not return the hidden states that its output_hidden_states asked for")
    return [*(states if norm is None else map(norm, states)), final]


def merged_candidates(columns: Sequence[Features]) -> list[Features]:
    """The anchors, and all candidates in one batch where they have the same features: sentence-transformers' calls."""
    return [columns[0], *_merged(columns[1:])]


def depends_on_padding(model: Any) -> bool:
    """Whether what the model makes of a text depends on the width of its batch."""
    return model_type(model) in PADDING_SENSITIVE


def model_type(model: Any) -> str | None:
    """The encoder's, by transformers' name; None where its configuration has none."""
    return getattr(model[0].auto_model.config, "model_type", None)


def merged_alike(columns: Sequence[Features], may_pad: bool = True, reads_prompts: bool = True) -> list[Features]:
    """Columns that follow each other in one batch each where that adds little padding; none unless it ``may_pad``.

    Those with prompts of different lengths are unlike only where the pooling reads the lengths.
    """
    if not reads_prompts:
        columns = [{name: value for name, value in column.items() if name != "prompt_length"} for column in columns]
    groups: list[list[Features]] = []
    for column in columns:
        if groups and _is_alike([*groups[-1], column], may_pad):
            groups[-1].append(column)
        else:
            groups.append([column])
    return list(itertools.chain.from_iterable(map(_merged, groups)))


def _is_alike(columns: Sequence[Features], may_pad: bool) -> bool:
    ids = [column["input_ids"] for column in columns if "input_ids" in column]
    if len(ids) < len(columns):
        return False
    own = sum(each.numel() for each in ids)
    padding = max(each.shape[-1] for each in ids) * sum(len(each) for each in ids) - own
    # Without a mask, padding would count as tokens.
    if padding > 0 and not (may_pad and all("attention_mask" in column for column in columns)):
        return False
    return padding <= (MERGED_TOKENS if ids[0].device.type == "cpu" else MERGED_SHARE * own)


def _merged(columns: Sequence[Features]) -> list[Features]:
    merged = merge_feature_batches(list(columns)) if len(columns) > 1 else None
    return list(columns) if merged is None else [merged]


def is_packed(features: Features) -> bool:
    """Whether texts stand one after another without padding, for flash attention."""
    return "cu_seq_lens_q" in features


def joined_packed(columns: Sequence[Features]) -> list[Features]:
    """All packed columns as one batch: there is nothing to pad.

    What DataCollatorWithFlattening gives: tokens along the last dimension, offsets, the largest length.
    """
    counts = [len(column["cu_seq_lens_q"]) - 1 for column in columns]
    tokens = [column["input_ids"].shape[-1] for column in columns]
    joined = dict(columns[0])
    for name in set(joined) - {"prompt_length"}:
        values = [column[name] for column in columns]
        first = values[0]
        if name in ("cu_seq_lens_q", "cu_seq_lens_k"):
            starts = itertools.accumulate(tokens, initial=0)
            shifted = [value[1:] + start for value, start in zip(values, starts, strict=False)]
            joined[name] = torch.cat([first[:1], *shifted]).to(first.dtype)
        elif name in ("max_length_q", "max_length_k"):
            joined[name] = max(values)
        elif name == "seq_idx":
            starts = itertools.accumulate(counts, initial=0)
            joined[name] = torch.cat([v + start for v, start in zip(values, starts, strict=False)], dim=-1).to(first)
        elif isinstance(first, Tensor) and first.ndim > 0 and first.shape[-1] == tokens[0]:
            joined[name] = torch.cat(values, dim=-1)
    lengths = [torch.full((count,), _prompt_length(column)) for count, column in zip(counts, columns, strict=True)]
    joined["prompt_length"] = torch.cat(lengths)
    return [joined]


def _tokens(states: Sequence[Sequence[Tensor]], outputs: Sequence[Features], pooling: Any, mode: str) -> Tokens:
    """Blocks of states (calls × layers) and the coefficients of sentence-transformers' ``Pooling`` for them."""
    dtype = _common_dtype(state.dtype for block in states for state in block)
    layer_major = [state.to(dtype) for layer in zip(*states, strict=True) for state in layer]
    if is_packed(outputs[0]):
        (output,) = outputs
        offsets = output["cu_seq_lens_q"].to(torch.int64, copy=True)
        check_offsets(offsets, layer_major[0].shape[-2])
        table = packed_coefficients(
            offsets,
            layer_major[0].shape[-2],
            mode,
            accumulate_dtype(dtype),
            prompt_lengths=None if pooling.include_prompt else _prompt_lengths(output),
        )
        return Tokens(layer_major, [table], offsets, maximum=mode == "max")
    tables = [
        _padded_table(output, _mask(output, block[-1]), pooling, mode, accumulate_dtype(dtype))
        for output, block in zip(outputs, states, strict=True)
    ]
    return Tokens(layer_major, tables, maximum=mode == "max")


def _padded_table(output: Features, mask: Tensor, pooling: Any, mode: str, dtype: torch.dtype) -> Tensor:
    table = padded_coefficients(
        mask,
        mode,
        dtype,
        prompt_length=0 if pooling.include_prompt else _prompt_length(output),
        weights_sum=output.get("token_weights_sum"),
    )
    weights = output.get("token_weights")
    return table if weights is None else table * weights.to(dtype)


def _mask(features: Features, states: Tensor) -> Tensor:
    mask = features.get("attention_mask")
    if mask is not None and mask.shape[-1] == states.shape[1]:
        return mask
    return torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)


def _prompt_length(features: Features) -> int:
    length = features.get("prompt_length", 0)
    return int(length[0]) if isinstance(length, Tensor) else int(length)


def _prompt_lengths(packed: Features) -> Tensor:
    """Of each packed text."""
    lengths, count = packed.get("prompt_length", 0), len(packed["cu_seq_lens_q"]) - 1
    if isinstance(lengths, Tensor) and len(lengths) == count:
        return lengths.to(packed["cu_seq_lens_q"].device)
    return torch.full((count,), _prompt_length(packed), device=packed["cu_seq_lens_q"].device)


def _common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Autocast leaves some layers in float32 and others in a half type."""
    common, *others = set(dtypes)
    for dtype in others:
        common = torch.promote_types(common, dtype)
    return common
