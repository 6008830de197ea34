"""Base losses beside plain InfoNCE, for all layers and dims at once: batched torch over the nested cosines.

An adapter is a function of a sentence-transformers loss, the pooled rows and the labels that gives the loss of every
cell (L, K), and one that says what it does not do. Prefixes are normalised, as MatryoshkaLoss does before it calls its
base loss, so that there a dot product is a cosine.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sentence_transformers.base.losses.gradcache import _create_minibatch, _minibatch_ranges
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import (
    batch_to_device,
    cos_sim,
    dot_score,
    misc,
    pairwise_angle_sim,
    pairwise_cos_sim,
    pairwise_dot_score,
    pytorch_cos_sim,
)
from torch import Tensor, nn

from ..similarity import masked_logsumexp
from .embed import Features, is_packed
from .rows import Rows

COSINES = (cos_sim, pytorch_cos_sim)


class Adapter(NamedTuple):
    """How a type of loss runs on the fused path."""

    cells: Callable[[Any, Rows], Tensor]  # of the loss and the rows: (L, K)
    refusal: Callable[[Any, bool, bool], str | None]  # as the function of that name below
    fewest_columns: int
    most_columns: int | None = None


def is_ranking(loss: Any) -> bool:
    """Whether the loss ranks candidates, of which some may be no negatives."""
    adapter = ADAPTERS.get(type(loss))
    return adapter is not None and adapter.cells is _ranking


def info_nce_directions(loss: Any) -> list[str]:
    """The directions whose cross-entropies, as the fused kernel computes them, the loss is the mean of; or none."""
    if not is_ranking(loss):
        return []
    directions = set(loss.directions)
    is_sum = len(directions) == 1 or loss.partition_mode == "per_direction"
    return [direction for direction in ("query_to_doc", "doc_to_query") if direction in directions] if is_sum else []


def hardness(loss: Any) -> tuple[float, float]:
    """``hardness`` and ``own_hardness`` of ``m2d_ext.grid.Grid`` for a loss of that cross-entropy."""
    if not _is_hardened(loss):
        return 0.0, 0.0
    strength = float(loss.hardness_strength)
    others = 0.0 if loss.hardness_mode == "hard_negatives" else strength
    own = 0.0 if loss.hardness_mode == "in_batch_negatives" else strength
    return others, own


def refusal(loss: Any, normalized: bool, teaches: bool) -> str | None:
    """Why a base loss has no fused path, in words that follow its name; None if it has one.

    Args:
        loss: the base loss.
        normalized: whether it is given normalised embeddings.
        teaches: whether the labels are as wide as the embeddings, and so are taken for a teacher's.
    """
    adapter = ADAPTERS.get(type(loss))
    return "has no fused path" if adapter is None else adapter.refusal(loss, normalized, teaches)


def check_columns(loss: Any, count: int) -> None:
    """ValueError where a batch has too few columns for the loss, or too many."""
    _, _, fewest, most = ADAPTERS[type(loss)]
    if count < fewest or (most is not None and count > most):
        wanted = f"at least {fewest}" if most is None else f"{fewest} or {most}"
        raise ValueError(f"Expected {wanted} embeddings, got {count}")


def cells(loss: Any, rows: Rows) -> Tensor:
    """The loss of every layer and dim, (L, K) in float64."""
    return ADAPTERS[type(loss)].cells(loss, rows)


def score_scale(loss: Any) -> float:
    """What the loss multiplies cosines by, 1 where it ranks nothing."""
    if isinstance(loss, losses.GISTEmbedLoss | losses.CachedGISTEmbedLoss):
        return 1 / loss.temperature
    if isinstance(loss, losses.DistillKLDivLoss):
        return 1 / loss.student_temperature
    return float(getattr(loss, "scale", 1.0))


# -- in-batch ranking: sentence-transformers' multiple_negatives_ranking.py --


def _is_hardened(loss: Any) -> bool:
    return loss.hardness_mode is not None and loss.hardness_strength > 0


def _ranking_refusal(loss: Any, normalized: bool, _: bool) -> str | None:
    is_cosine = loss.similarity_fct in COSINES or (normalized and loss.similarity_fct is dot_score)
    return None if is_cosine else "has another similarity_fct than cos_sim"


def _ranking(loss: Any, rows: Rows) -> Tensor:
    documents = torch.cat(rows.gathered[1:], dim=1)
    blocks = {
        "query_to_doc": (rows.columns[0], documents),
        "query_to_query": (rows.columns[0], rows.gathered[0]),
        "doc_to_query": (rows.columns[1], rows.gathered[0]),
        "doc_to_doc": (rows.columns[1], documents),
    }
    used = {"query_to_doc", *loss.directions}
    blocks = {direction: block for direction, block in blocks.items() if direction in used}
    candidates = sum(others.shape[1] for _, others in blocks.values())
    return rows.by_anchors(candidates, partial(_rank_anchors, loss, rows, blocks)).mean(-1)


def _rank_anchors(loss: Any, rows: Rows, blocks: dict[str, tuple[Tensor, Tensor]], anchors: slice) -> Tensor:
    own = rows.own_of(anchors)
    own_documents = own.repeat(1, len(rows.gathered) - 1)
    false = _false_negatives(rows, blocks, anchors)
    # What is never a candidate: a text itself among those of its own kind.
    excluded = {"query_to_query": own, "doc_to_doc": own_documents}
    sums = []
    for direction, cosines, over_rows in _cosines_by_direction(rows, blocks, anchors):
        mask = _either(excluded.get(direction), false.get(direction))
        mask = mask.mT if over_rows and mask is not None else mask
        scores, scale = cosines, loss.scale
        if direction == "query_to_doc":
            positive = loss.scale * cosines.diagonal(rows.offset + anchors.start, -2, -1)  # of each anchor: (L, K, A)
            if _is_hardened(loss):
                table = _hardness_table(loss, own, own_documents).to(cosines)
                scores, scale = (cosines * loss.scale).addcmul(cosines.detach(), table), 1.0
        sums.append(masked_logsumexp(scores, scale, mask, over_rows))
    joined = torch.stack(sums)
    return (joined.logsumexp(0) if loss.partition_mode == "joint" else joined.mean(0)) - positive


def _cosines_by_direction(
    rows: Rows, blocks: dict[str, tuple[Tensor, Tensor]], anchors: slice
) -> Iterator[tuple[str, Tensor, bool]]:
    """Of the blocks in their order, (L, K, A, M); or (L, K, M, A), and true, where the anchors are the columns."""
    all_own = rows.gathered is rows.columns and anchors == slice(0, rows.batch_size)
    to_documents = None
    for direction, (texts, others) in blocks.items():
        if direction == "doc_to_query" and all_own and to_documents is not None:
            yield direction, to_documents[..., : rows.batch_size], True  # the same pairs of rows
            continue
        cosines = rows.cosines(texts[:, anchors], others)
        if direction == "query_to_doc":
            to_documents = cosines
        yield direction, cosines, False


def _either(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    return mask | other if mask is not None and other is not None else mask if other is None else other


def _false_negatives(rows: Rows, blocks: dict[str, tuple[Tensor, Tensor]], anchors: slice) -> dict[str, Tensor]:
    """By direction, (A, M): the candidates that are taken for positives. They are the same in every cell."""
    if rows.false_negative_margin is None:
        return {}
    final, own = rows.final(), rows.own_of(anchors)
    a, b = (column[:, anchors] for column in final.columns[:2])
    bound = final.pairs(a, b)[0, 0, :, None] + rows.false_negative_margin
    false = {
        direction: final.cosines(texts[-1:, anchors].detach(), others[-1:].detach())[0, 0] > bound
        for direction, (texts, others) in blocks.items()
    }
    for direction in ("query_to_doc", "doc_to_query"):
        if direction in false:  # the positive itself
            false[direction][:, : own.shape[1]] &= ~own
    return false


def _hardness_table(loss: Any, own: Tensor, own_documents: Tensor) -> Tensor:
    """(A, (C - 1) M), from where an anchor's own text is in one column (A, M) and in all of the documents'."""
    others, own_others = hardness(loss)
    table = torch.full(own_documents.shape, others, device=own.device).masked_fill_(own_documents, own_others)
    table[:, : own.shape[1]].masked_fill_(own, 0)
    return table


# -- ranking by labels: cosent.py, angle.py --


def _cosent_refusal(loss: Any, *_: Any) -> str | None:
    return None if loss.similarity_fct is pairwise_cos_sim else "has another similarity_fct than pairwise_cos_sim"


def _cosent(loss: Any, rows: Rows) -> Tensor:
    labels = _one_label_each(loss, rows.labels, rows.batch_size)
    return _rank_by_labels(rows.pairs(*rows.columns[:2]) * loss.scale, labels)


def _angle_refusal(loss: Any, *_: Any) -> str | None:
    return None if loss.similarity_fct is pairwise_angle_sim else "has another similarity_fct than pairwise_angle_sim"


def _angle(loss: Any, rows: Rows) -> Tensor:
    anchors, *others = rows.columns
    labels = rows.labels
    if len(others) == 1:
        if labels is None:
            raise ValueError("AnglELoss requires labels for datasets with pairs.")
        labels = _one_label_each(loss, labels, rows.batch_size)
    else:
        labels = torch.ones(rows.batch_size, device=anchors.device) if labels is None else labels
        labels = _one_label_each(loss, labels, rows.batch_size)
        labels = torch.cat([labels, (1 - labels).repeat(len(others) - 1)])
    anchors, candidates = anchors.repeat(1, len(others), 1), torch.cat(others, dim=1)
    sines = torch.stack([_sines(anchors[..., :d].double(), candidates[..., :d].double()) for d in rows.dims], dim=1)
    return _rank_by_labels((rows.pairs(anchors, candidates) + sines).abs() * loss.scale, labels)


def _sines(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the pairs of dimensions i and i + d / 2 of the normalised rows, d made even: (L, N)."""
    a, b = (F.pad(F.normalize(rows, dim=-1), (0, rows.shape[-1] % 2)) for rows in (a, b))
    (first_a, last_a), (first_b, last_b) = a.chunk(2, -1), b.chunk(2, -1)
    return (last_a * first_b - first_a * last_b).sum(-1)


def _one_label_each(loss: Any, labels: Tensor, batch_size: int) -> Tensor:
    if labels.numel() != batch_size:
        raise ValueError(
            f"{type(loss).__name__} expects {batch_size} labels (one per example), "
            f"but got {labels.numel()} labels with shape {tuple(labels.shape)}."
        )
    return labels.view(-1)


def _rank_by_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """log(1 + sum exp(s_i - s_j)) over the pairs with label i < label j, of scores (L, K, B)."""
    labels, order = (labels.int() if labels.dtype == torch.bool else labels).sort()
    scores = scores[..., order]
    higher = torch.searchsorted(labels, labels, right=True)
    suffixes = F.pad((-scores).flip(-1).logcumsumexp(-1).flip(-1), (0, 1), value=-torch.inf)
    return F.pad(scores + suffixes[..., higher], (1, 0)).logsumexp(-1)


# -- regression: cosine_similarity.py, margin_mse.py, embed_distill.py, mse.py, distill_kl_div.py --


def _cosine_refusal(loss: Any, *_: Any) -> str | None:
    plain = type(loss.loss_fct) is nn.MSELoss and loss.loss_fct.reduction == "mean"
    if not plain or type(loss.cos_score_transformation) is not nn.Identity:
        return "has another loss_fct than MSELoss() or a cos_score_transformation"
    return None


def _cosine(loss: Any, rows: Rows) -> Tensor:
    labels = _one_label_each(loss, rows.labels, rows.batch_size)
    return (rows.pairs(*rows.columns[:2]) - labels.float()).square().mean(-1)


def _dot_refusal(loss: Any, normalized: bool, teaches: bool) -> str | None:
    if teaches:
        return "has labels as wide as the embeddings, which MatryoshkaLoss cuts"
    is_cosine = loss.similarity_fct is pairwise_cos_sim or (normalized and loss.similarity_fct is pairwise_dot_score)
    return None if is_cosine else "has a similarity_fct that is no cosine of these embeddings"


def _scores(rows: Rows) -> Tensor:
    """Of the anchors with each other column: (L, K, B, C - 1)."""
    return torch.stack([rows.pairs(rows.columns[0], column) for column in rows.columns[1:]], dim=-1)


def _margin_mse(_: Any, rows: Rows) -> Tensor:
    labels, negatives = rows.labels, len(rows.columns) - 2
    if labels.shape == (rows.batch_size, negatives + 1):
        labels = labels[:, :1] - labels[:, 1:]
    if labels.shape == (rows.batch_size,):
        labels = labels[:, None]
    if labels.shape != (rows.batch_size, negatives):
        raise ValueError(
            f"Labels shape {labels.shape} does not match expected shape {(rows.batch_size, negatives)}. "
            "Ensure that your dataset labels/scores are 1) lists of differences between positive scores and "
            "negatives scores (length `num_negatives`), or 2) lists of positive and negative scores "
            "(length `num_negatives + 1`)."
        )
    scores = _scores(rows)
    return (scores[..., :1] - scores[..., 1:] - labels.detach().to(scores)).square().mean((-1, -2))


def _distill_kl(loss: Any, rows: Rows) -> Tensor:
    labels, shape = rows.labels, (rows.batch_size, len(rows.columns) - 1)
    if shape[1] < 2:
        raise ValueError(
            f"{type(loss).__name__} expects at least 3 columns (query, positive, negative_1, ...), "
            f"but got {len(rows.columns)}. A softmax over one candidate is constant, so the loss and "
            "its gradient would be identically zero. Add at least a second candidate column."
        )
    if labels.shape != shape:
        raise ValueError(
            f"{type(loss).__name__} expects teacher scores of shape (batch_size, N) = {shape} for {shape[1]} "
            f"candidate columns, but got {tuple(labels.shape)}."
        )
    student = (_scores(rows) / loss.student_temperature).log_softmax(-1)
    teacher = (labels.detach() / loss.teacher_temperature).softmax(-1)
    if not getattr(loss, "_checked_teacher_scale", True):
        loss._checked_teacher_scale = True
        misc.check_teacher_targets(teacher, labels, loss.teacher_temperature, type(loss).__name__)
    kl = (torch.xlogy(teacher, teacher) - teacher * student).sum(-1).mean(-1)
    return kl * loss.student_temperature**2


def _distill_refusal(loss: Any, normalized: bool, teaches: bool) -> str | None:
    if getattr(loss, "projection", None) is not None:
        return "has a projection"
    if loss.distance_metric == "l2":
        return "has the distance_metric l2"
    if loss.distance_metric == "mse" and not normalized:
        return "has the distance_metric mse for embeddings that are not normalised"
    return None if teaches else "has labels of another shape than the embeddings"


def _distill(loss: Any, rows: Rows) -> Tensor:
    labels = rows.labels.detach()
    if labels.ndim == 3 and labels.shape[1] != len(rows.columns):
        raise ValueError(
            f"Number of label columns ({labels.shape[1]}) does not match number of input text columns "
            f"({len(rows.columns)}). Either pass 3D labels with shape (batch_size, {len(rows.columns)}, teacher_dim), "
            "or pass 2D labels of shape (batch_size, teacher_dim) to broadcast a single label across all columns."
        )
    distances = []
    for c, column in enumerate(rows.columns):
        # A teacher is as wide as the model's truncate_dim, if it has one, and no dim is beyond that.
        column = column[..., : labels.shape[-1]]
        teacher = (labels if labels.ndim == 2 else labels[:, c]).to(column).expand_as(column)
        cosines = rows.pairs(column, teacher)
        if loss.distance_metric == "cosine":
            distances.append((1 - cosines).mean(-1))
            continue
        # |e - y|^2 = |e|^2 - 2 e y + |y|^2, where |e| is 1, or 0 for a row of zeros.
        norms = torch.stack([teacher[..., :d].double().norm(dim=-1) for d in rows.dims], dim=1)
        ones = torch.stack([(column[..., :d].detach() != 0).any(-1).double() for d in rows.dims], dim=1)
        widths = torch.tensor(rows.dims, device=column.device)[:, None]
        distances.append(((ones - 2 * cosines * norms + norms.square()) / widths).mean(-1))
    return torch.stack(distances).mean(0)


# -- guided and regularised: gist_embed.py, global_orthogonal_regularization.py --


def _gist_refusal(*_: Any) -> None:
    return None


def _gist(loss: Any, rows: Rows) -> Tensor:
    anchor, positive = rows.columns[:2]
    positives, *negatives = rows.gathered[1:]
    with rows.as_called():
        guides = _guide(loss, rows.features)
    guide_anchor, guide_positive = guides[:2]
    gathered_guides = rows.gather(torch.cat(guides)[None])[0].chunk(len(guides))
    guide_positives, *guide_negatives = gathered_guides[1:]
    scale = score_scale(loss)
    others = [(anchor, anchor, guide_anchor, guide_anchor)] if loss.contrast_anchors else []
    others += [(positive, positives, guide_positive, guide_positives)] if loss.contrast_positives else []
    others += [(anchor, each, guide_anchor, guide) for each, guide in zip(negatives, guide_negatives, strict=True)]

    def of_anchors(part: slice) -> Tensor:
        place = rows.offset + part.start
        guided = _guided(loss, rows, guide_anchor[part], guide_positives)
        bound = guided.diagonal(place)[:, None]
        bound = bound - (loss.margin if loss.margin_strategy == "absolute" else bound.abs() * loss.margin)
        cosines = rows.cosines(anchor[:, part], positives)
        sums = [masked_logsumexp(cosines, scale, (guided > bound) & ~rows.own_of(part))]
        for a, b, guide_a, guide_b in others:
            mask = _guided(loss, rows, guide_a[part], guide_b) > bound
            sums.append(masked_logsumexp(rows.cosines(a[:, part], b), scale, mask))
        return torch.stack(sums).logsumexp(0) - cosines.diagonal(place, -2, -1) * scale

    scores = positives.shape[1] + sum(b.shape[1] for _, b, _, _ in others)
    return rows.by_anchors(scores, of_anchors).mean(-1)


def _guided(loss: Any, rows: Rows, a: Tensor, b: Tensor) -> Tensor:
    """The guide's similarities (A, B), by sentence-transformers' own function, whose products are as wide as rows."""
    with rows.as_called():
        return torch.cat([loss.sim_matrix(few, b) for few in a.split(rows.most_at_once(b.numel()))])


@torch.no_grad()
def _guide(loss: Any, features: Sequence[Features]) -> list[Tensor]:
    """The guide's embeddings of the columns; all cells share them."""
    if not isinstance(loss, losses.CachedGISTEmbedLoss):
        return _guide_at_once(loss, features)
    sizes = (loss.mini_batch_size, loss.mini_batch_num_tokens)
    return [
        torch.cat(
            [
                _guide_at_once(loss, [_create_minibatch(column, begin, end)])[0]
                for begin, end in _minibatch_ranges(column, *sizes)
            ]
        )
        for column in features
    ]


def _guide_at_once(loss: Any, features: Sequence[Features]) -> list[Tensor]:
    columns = [dict(column) for column in features]
    if loss.must_retokenize:
        texts = [loss.tokenizer.batch_decode(_texts_of(column), skip_special_tokens=True) for column in columns]
        columns = [batch_to_device(loss.guide.preprocess(text), loss.guide.device) for text in texts]
    return embed_columns(loss.guide, columns)


def _texts_of(column: Features) -> Any:
    """Token ids by text."""
    ids = column["input_ids"]
    return ids[0].split(column["cu_seq_lens_q"].diff().tolist()) if is_packed(column) else ids


def _orthogonal_refusal(loss: Any, normalized: bool, teaches: bool) -> str | None:
    return _ranking_refusal(loss, normalized, teaches)


def _orthogonal(loss: Any, rows: Rows) -> Tensor:
    count = max(rows.batch_size * (rows.batch_size - 1), 1)
    expected = 1 / torch.tensor(rows.dims, dtype=torch.float64, device=rows.columns[0].device)
    terms = []
    for column in rows.columns:
        mean, moment = rows.by_anchors(rows.batch_size, partial(_off_diagonal_sums, rows, column)).sum(-1) / count
        terms.append(
            (loss.mean_weight or 0.0) * mean.square()
            + (loss.second_moment_weight or 0.0) * torch.relu(moment - expected)
        )
    total = torch.stack(terms)
    return total.sum(0) if loss.aggregation == "sum" else total.mean(0)


def _off_diagonal_sums(rows: Rows, column: Tensor, part: slice) -> Tensor:
    """Of the cosines with a column's other rows and of their squares, (2, L, K, A)."""
    others = rows.cosines(column[:, part], column).masked_fill(rows.own_of(part), 0)
    return torch.stack([others.sum(-1), others.square().sum(-1)])


ADAPTERS = {
    losses.MultipleNegativesRankingLoss: Adapter(_ranking, _ranking_refusal, 2),
    losses.MultipleNegativesSymmetricRankingLoss: Adapter(_ranking, _ranking_refusal, 2),
    losses.CoSENTLoss: Adapter(_cosent, _cosent_refusal, 2),
    losses.AnglELoss: Adapter(_angle, _angle_refusal, 2),
    losses.CosineSimilarityLoss: Adapter(_cosine, _cosine_refusal, 2),
    losses.MarginMSELoss: Adapter(_margin_mse, _dot_refusal, 3),
    losses.DistillKLDivLoss: Adapter(_distill_kl, _dot_refusal, 1),  # which says why it wants three
    losses.MSELoss: Adapter(_distill, _distill_refusal, 1),
    losses.EmbedDistillLoss: Adapter(_distill, _distill_refusal, 1),
    losses.GISTEmbedLoss: Adapter(_gist, _gist_refusal, 2, 3),
    losses.CachedGISTEmbedLoss: Adapter(_gist, _gist_refusal, 2),
    losses.GlobalOrthogonalRegularizationLoss: Adapter(_orthogonal, _orthogonal_refusal, 1),
}
