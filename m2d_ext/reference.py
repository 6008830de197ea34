"""The loss in eager PyTorch, line by line: truth, baseline and fallback.

It runs on any device and differentiates by autograd. The formulas are those of ``csrc/math.h``, in the
same order and with the same names; cells whose weight is 0 are not computed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-12  # torch.nn.functional.normalize's eps


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are taken: float32 for the half types, else the states' own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def pool(hidden_states: list[Tensor], coefficients: list[Tensor], cu_seqlens: Tensor | None = None) -> Tensor:
    """Weighted token sums ``P[l, n, :] = sum_t a[n, t] H[l, n, t, :]``.

    Args:
        hidden_states: L * blocks tensors, layer-major; a block is (n, T, D), or packed (total_tokens, D).
        coefficients: ``a`` of each block, (n, T), or packed (total_tokens,).
        cu_seqlens: packed only, (N + 1,) cumulative lengths.

    Returns:
        (L, N, D) in the accumulation dtype.
    """
    blocks = len(coefficients)
    layers = [hidden_states[i : i + blocks] for i in range(0, len(hidden_states), blocks)]
    if cu_seqlens is not None:
        return torch.stack([_pool_packed(states[0], coefficients[0], cu_seqlens) for states in layers])
    return torch.stack([torch.cat([_pool_padded(h, a) for h, a in zip(s, coefficients, strict=True)]) for s in layers])


def pool_max(hidden_states: list[Tensor], coefficients: list[Tensor], cu_seqlens: Tensor | None = None) -> Tensor:
    """Maxima over the tokens whose coefficient is not 0; 0 for a text without one. Arguments as in ``pool``."""
    blocks = len(coefficients)
    layers = [hidden_states[i : i + blocks] for i in range(0, len(hidden_states), blocks)]
    if cu_seqlens is not None:
        # Split per text: a maximum over one packed text is that of a padded batch of one.
        lengths = cu_seqlens.diff().tolist()
        coefficients = [a[None] for a in coefficients[0].split(lengths)]
        layers = [[text[None] for text in states[0].split(lengths)] for states in layers]
    return torch.stack([torch.cat([_max_padded(h, a) for h, a in zip(s, coefficients, strict=True)]) for s in layers])


def _max_padded(states: Tensor, coefficients: Tensor) -> Tensor:
    if states.shape[1] == 0:
        return coefficients.new_zeros(states.shape[0], states.shape[2])
    masked = states.to(coefficients.dtype).masked_fill((coefficients == 0)[..., None], -torch.inf)
    empty = (coefficients == 0).all(1, keepdim=True)
    return masked.max(dim=1).values.masked_fill(empty, 0)


# One running sum loses digits with every token: so many are summed at a time, and then their sums.
_TOKENS_TOGETHER = 64


def _pool_padded(states: Tensor, coefficients: Tensor) -> Tensor:
    states = states.to(coefficients.dtype)
    whole = states.shape[1] // _TOKENS_TOGETHER * _TOKENS_TOGETHER
    if states.shape[1] <= _TOKENS_TOGETHER:
        return torch.bmm(coefficients[:, None], states).squeeze(1)
    weights = coefficients[:, :whole].unflatten(1, (-1, 1, _TOKENS_TOGETHER))
    sums = (weights @ states[:, :whole].unflatten(1, (-1, _TOKENS_TOGETHER))).sum(1)
    return (sums + torch.bmm(coefficients[:, None, whole:], states[:, whole:])).squeeze(1)


def _pool_packed(states: Tensor, coefficients: Tensor, cu_seqlens: Tensor) -> Tensor:
    num_texts, num_tokens = len(cu_seqlens) - 1, len(states)
    text = torch.repeat_interleave(torch.arange(num_texts, device=states.device), cu_seqlens.diff())
    # Neither part of the sum ever decreases: it is another one for every text and every run of tokens.
    run = text + torch.arange(num_tokens, device=states.device) // _TOKENS_TOGETHER
    num_runs = num_texts + num_tokens // _TOKENS_TOGETHER
    sums = coefficients.new_zeros(num_runs, states.shape[-1])
    sums = sums.index_add(0, run, coefficients[:, None] * states.to(coefficients.dtype))
    text_of_run = torch.zeros(num_runs, dtype=torch.int64, device=states.device).scatter(0, run, text)
    return sums.new_zeros(num_texts, states.shape[-1]).index_add(0, text_of_run, sums)


def matryoshka_2d_loss_pooled(
    pooled: Tensor,
    candidates: Tensor | None,
    target_offset: int,
    *,
    num_columns: int,
    dims: list[int],
    weights: Tensor,
    kl_weights: Tensor,
    kl_temperature: float,
    scale: float,
    normalize: bool,
    hardness: float = 0.0,
    own_hardness: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss over pooled rows.

    Args:
        pooled: P (L, N, D), column-major: rows 0..B are the anchors, N = num_columns * B.
        candidates: (L, M, D), or None for the rows B..N of ``pooled``.
        target_offset: anchor i's positive is candidate ``target_offset + i``.
        num_columns: C.
        dims: K ascending, distinct prefix lengths.
        weights: W (L, K), float64 on the CPU.
        kl_weights: V (L,), float64 on the CPU, 0 for the final layer.
        kl_temperature: tau.
        scale: factor of the cosines.
        normalize: whether rows are normalised before anything else.
        hardness: as ``m2d_ext.grid.Grid`` has it.
        own_hardness: as there.

    Returns:
        The loss (), the cross-entropies (L, K) and the KLs (L,), NaN where the weight is 0, both detached.
    """
    embeddings = F.normalize(pooled, dim=-1, eps=NORM_EPS) if normalize else pooled
    num_anchors = embeddings.shape[1] // num_columns
    anchors, others = embeddings[:, :num_anchors], embeddings[:, num_anchors:]
    if candidates is not None:
        others = F.normalize(candidates, dim=-1, eps=NORM_EPS) if normalize else candidates
    hard = None
    if hardness != 0 or own_hardness != 0:
        hard = _hardness(num_anchors, others, target_offset, num_columns, hardness, own_hardness)
    cells = _cross_entropies(anchors, others, target_offset, dims, weights != 0, scale, hard)
    kl = _kl_divergences(embeddings, kl_weights != 0, kl_temperature)
    loss = _weighted_sum(cells, weights) + _weighted_sum(kl, kl_weights)
    return loss, cells.detach(), kl.detach()


def _weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    used = (weights != 0).to(values.device)
    return (values.masked_fill(~used, 0) * weights.to(values)).sum()


def _prefix_inverse_norms(rows: Tensor, dims: list[int]) -> list[Tensor]:
    """1 / max(|rows[..., :d]|, eps) for each d, from telescoped squares. (L, R) each."""
    inverses = []
    squared = torch.zeros_like(rows[..., 0])
    for begin, end in zip([0, *dims], dims, strict=False):
        squared = squared + rows[..., begin:end].square().sum(-1)
        clamped = squared < NORM_EPS**2
        inverses.append(torch.where(clamped, 1 / NORM_EPS, squared.masked_fill(clamped, 1).rsqrt()))
    return inverses


def _hardness(
    num_anchors: int, candidates: Tensor, target_offset: int, num_columns: int, others: float, own: float
) -> Tensor:
    """The table h (B, M): 0 for the positive, ``own`` at its place in the other columns, ``others`` elsewhere."""
    size = candidates.shape[1] // (num_columns - 1)
    is_own = torch.eye(num_anchors, size - target_offset, dtype=torch.bool, device=candidates.device)
    is_own = F.pad(is_own, (target_offset, 0))
    hard = candidates.new_full((num_anchors, num_columns - 1, size), others).masked_fill_(is_own[:, None], own)
    hard[:, 0].masked_fill_(is_own, 0)
    return hard.flatten(1)


def _cross_entropies(
    anchors: Tensor,
    candidates: Tensor,
    target_offset: int,
    dims: list[int],
    used: Tensor,
    scale: float,
    hardness: Tensor | None,
) -> Tensor:
    """CE (L, K); NaN where not used. One pass over the dimensions serves all prefixes."""
    num_layers, num_anchors, _ = anchors.shape
    targets = torch.arange(num_anchors, device=anchors.device) + target_offset
    targets = targets.expand(num_layers, -1)[..., None]
    inverse_a = _prefix_inverse_norms(anchors, dims)
    inverse_b = _prefix_inverse_norms(candidates, dims)
    dot = anchors.new_zeros(num_layers, num_anchors, candidates.shape[1])
    columns = []
    for k, (begin, end) in enumerate(zip([0, *dims], dims, strict=False)):
        # U_k = U_{k-1} + A[:, chunk k] B[:, chunk k]^T
        dot = dot + anchors[..., begin:end] @ candidates[..., begin:end].mT
        logits = scale * dot * inverse_a[k][:, :, None] * inverse_b[k][:, None, :]
        if hardness is not None:
            logits = logits + hardness / scale * logits.detach()
        target_logits = logits.gather(2, targets).squeeze(-1)
        columns.append(_cross_entropy(logits.scatter(2, targets, -torch.inf), target_logits).mean(-1))
    return torch.stack(columns, dim=1).masked_fill(~used.to(anchors.device), torch.nan)


def _cross_entropy(other_logits: Tensor, target_logits: Tensor) -> Tensor:
    """logsumexp(all) - target = log(1 + exp(logsumexp(others) - target)), exact in saturated rows too.

    The difference of the left side, and the probability - 1 of its gradient, would be all rounding there.
    """
    if other_logits.shape[-1] == 1:
        return target_logits * 0
    return F.softplus(other_logits.logsumexp(-1) - target_logits, threshold=80)


def _kl_divergences(embeddings: Tensor, used: Tensor, temperature: float) -> Tensor:
    """KL (L,) to the final layer's feature softmax, detached; NaN where not used."""
    if not torch.compiler.is_compiling() and not used.any():  # traced, the question would break the graph
        return embeddings.new_full((len(embeddings),), torch.nan)
    teacher = F.log_softmax(embeddings[-1].detach() / temperature, dim=-1)
    student = F.log_softmax(embeddings / temperature, dim=-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean(-1)
    return kl.masked_fill(~used.to(kl.device), torch.nan)
