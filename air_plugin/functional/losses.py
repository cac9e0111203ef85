"""Losses of prompt training. Pure functions of logits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CandidateForm = Literal["cc", "rc", "lw", "cav"]


def candidate_weights(logits: Tensor | None, mask: Tensor, *, form: CandidateForm) -> Tensor:
    """Weights of the classes in `partial_label_loss`, from the model at the start of an epoch; they carry no gradient.

    cc: True for the candidates; nothing is weighed.
    rc: the probabilities of the candidates, normalised (risk-consistent: Feng et al., NeurIPS 2020, arXiv 2007.08929;
        the same update as PRODEN's, Lv et al., ICML 2020, arXiv 2002.08053).
    lw: the probabilities, normalised among the candidates and, apart from that, among the other classes (leveraged
        weighted: Wen et al., ICML 2021, arXiv 2106.05731).
    cav: 1 for the candidate of the largest class activation value |f - 1| f, f being its logit; ties go to the lower
        class (Zhang et al., ICLR 2022, "Exploiting Class Activation Value for Partial-Label Learning"). The value rises
        with f up to 0.5 and from 1 on, so where CLIP's scaled logits lie above 1, this is the most probable candidate.

    Args:
        logits: (B, C); None for the start of training: uniform where the form would take probabilities, and for cav.
        mask: (B, C) bool, True for candidates, at least one True a row.
        form: cc, rc, lw or cav.

    Returns:
        (B, C), at least 0. The candidates' sum to 1 in every row (rc, lw, cav). The other classes' are 0; in lw they
        sum to 1 where there are any.
    """
    if form == "cc":
        return mask.to(torch.get_default_dtype() if logits is None else logits.dtype)
    scores = torch.zeros_like(mask, dtype=torch.get_default_dtype()) if logits is None else logits.detach()
    if form == "cav" and logits is not None:
        activation = (scores - 1).abs() * scores
        best = activation.masked_fill(~mask, float("-inf")).argmax(dim=1)
        return F.one_hot(best, mask.shape[1]).to(scores)
    weights = _softmax_within(scores, mask)
    return weights + _softmax_within(scores, ~mask) if form == "lw" else weights


def _softmax_within(scores: Tensor, mask: Tensor) -> Tensor:
    """(B, C) softmax over the True entries of each row, 0 elsewhere; all 0 in a row without any."""
    # The largest finite number instead of infinity: a row without any is no NaN, and is cleared by the last step.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=1).masked_fill(~mask, 0)


def partial_label_loss(
    logits: Tensor, mask: Tensor, weights: Tensor | None = None, *, form: CandidateForm = "cc", leverage: float = 1.0
) -> Tensor:
    """The partial-label losses of CPL's family; with one candidate, cc, rc and cav are plain cross entropy.

    cc: -log sum_{c in S} p_c (Feng et al., NeurIPS 2020).
    rc, cav: -sum_{c in S} w_c log p_c.
    lw: -sum_{c in S} w_c log p_c - leverage * sum_{c not in S} w_c log(1 - p_c), the form with cross entropy.

    Args:
        logits: (B, C).
        mask: (B, C) bool, at least one True a row: the candidates S.
        weights: (B, C) of `candidate_weights` for the same form; cc takes none. No gradient flows into them.
        form: cc, rc, lw or cav.
        leverage: weight of the classes that are no candidates, at least 0; only lw reads it.

    Returns:
        The mean over the batch, at least 0.

    Raises:
        ValueError: the form takes weights and there are none.
    """
    log_probs = logits.log_softmax(dim=1)
    if form == "cc":
        return -log_probs.masked_fill(~mask, float("-inf")).logsumexp(dim=1).mean()
    if weights is None:
        raise ValueError(f"the form {form} takes weights; see candidate_weights")
    weights = weights.detach()
    loss = -(weights * log_probs).masked_fill(~mask, 0).sum(dim=1)
    if form == "lw":
        loss = loss - leverage * (weights * _log_complement(log_probs)).masked_fill(mask, 0).sum(dim=1)
    return loss.mean()


def _log_complement(log_probs: Tensor) -> Tensor:
    """log(1 - p) of every class of (B, C) log p, exact and with a finite gradient also where p is 1 in floating point.

    1 - p_c is the others' sum. Where p_c is at most a half it is computed as such; only the largest class of a row can
    have more, and its others are summed by themselves.
    """
    top = log_probs.argmax(dim=1, keepdim=True)
    others = log_probs.scatter(1, top, float("-inf")).logsumexp(dim=1, keepdim=True)
    rest = torch.log1p(-log_probs.clamp(max=-0.5).exp())
    return rest.scatter(1, top, others)


def consistency_loss(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """How far the predictions for two views of the same images lie apart (AiR, L_s): symmetric KL divergence.

    Args:
        logits_a: (B, C) of one view.
        logits_b: (B, C) of the other.

    Returns:
        The mean over the batch, at least 0; 0 where both agree.
    """
    log_a, log_b = logits_a.log_softmax(dim=1), logits_b.log_softmax(dim=1)
    forward = F.kl_div(log_b, log_a, log_target=True, reduction="batchmean")
    backward = F.kl_div(log_a, log_b, log_target=True, reduction="batchmean")
    return (forward + backward) / 2


def synthetic_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Cross entropy on kept generated images, whose class is known (AiR, the form `synthetic` of L_s).

    Args:
        logits: (B, C).
        label: (B,) class indices.
    """
    return F.cross_entropy(logits, label)
