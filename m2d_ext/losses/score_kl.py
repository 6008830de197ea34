"""The final layer's ranking of a batch's candidates, taught to every cell.

With z_c = scale cos(a, b) / T over the candidates b of an anchor a in cell c, and z the final layer's at full width,

    KL_c = mean over a of sum_b p_b (log p_b - log q_b),    p = softmax(z), detached,    q = softmax(z_c)

Unlike the KL between softmaxes of the embeddings' own coordinates, this has a scale of its own: normalised embeddings
are all but uniform as distributions over their coordinates, whatever they rank.
"""

from functools import partial

import torch
from torch import Tensor

from .rows import Rows


def score_kls(rows: Rows, scale: float, temperature: float) -> Tensor:
    """KL of every layer and dim, (L, K) in float64.

    Args:
        rows: of at least two columns: anchors, and candidates.
        scale: of the cosines, as in the loss.
        temperature: T.
    """
    candidates = torch.cat(rows.gathered[1:], dim=1)
    compute = partial(_of_anchors, rows, candidates, scale / temperature)
    return rows.by_anchors(candidates.shape[1], compute).mean(-1)


def _of_anchors(rows: Rows, candidates: Tensor, scale: float, anchors: slice) -> Tensor:
    students = (rows.cosines(rows.columns[0][:, anchors], candidates) * scale).log_softmax(-1)
    with torch.no_grad():
        final = rows.final()
        teacher = (final.cosines(final.columns[0][:, anchors], candidates[-1:]) * scale).log_softmax(-1)
    return (teacher.exp() * (teacher - students)).sum(-1)
