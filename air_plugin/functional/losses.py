"""Losses of prompt training, as pure functions of logits."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CandidateForm = Literal["cc", "rc", "lw", "cav"]


def candidate_weights(logits: Tensor | None, labels: Tensor, *, form: CandidateForm) -> Tensor:
    """Class weights w of `partial_label_loss` from the model at the start of an epoch, without gradient.

    With p = softmax(logits), the labels y of an image (1 for every candidate, or soft) and its candidates S:

    cc: w = y.
    rc: w_c = y_c p_c / sum_{k in S} y_k p_k for c in S (risk-consistent: Feng et al., NeurIPS 2020, arXiv 2007.08929;
        the same update as PRODEN's, Lv et al., ICML 2020, arXiv 2002.08053).
    lw: w_c = p_c / sum_{k in S} p_k for c in S, and w_c = p_c / sum_{k not in S} p_k for the other classes (leveraged
        weighted: Wen et al., ICML 2021, arXiv 2106.05731). CPL's code halves them after the first epoch; ours does not.
    cav: w_c = 1 for the candidate of the largest class activation value y |f - 1| f of its logit f; ties go to the
        lower class (Zhang et al., ICLR 2022, "Exploiting Class Activation Value for Partial-Label Learning"). The value
        rises with f above 1, so with CLIP's scaled logits this is usually the most probable candidate.

    Args:
        logits: (B, C); None at the start of training: the weights of uniform probabilities.
        labels: (B, C) bool, True for candidates, or soft labels that sum to 1; at least one above 0 a row.
        form: cc, rc, lw or cav.

    Returns:
        (B, C), at least 0. The weights of the candidates sum to 1 in every row (rc, lw, cav). Those of the other
        classes are 0, except for lw: there they sum to 1, too.
    """
    mask, dtype = labels > 0, torch.get_default_dtype() if logits is None else logits.dtype
    labels = labels.to(dtype)
    if form == "cc":
        return labels
    scores = torch.zeros_like(labels) if logits is None else logits.detach()
    if form == "cav" and logits is not None:
        activation = labels * (scores - 1).abs() * scores
        best = activation.masked_fill(~mask, float("-inf")).argmax(dim=1)
        return F.one_hot(best, mask.shape[1]).to(scores)
    if form == "lw":
        return _softmax_within(scores, mask) + _softmax_within(scores, ~mask)
    return _softmax_within(scores + labels.clamp(min=torch.finfo(dtype).tiny).log(), mask)


def _softmax_within(scores: Tensor, mask: Tensor) -> Tensor:
    """(B, C) softmax over the True entries of each row, 0 elsewhere; all 0 in a row without a True entry."""
    # The smallest finite number and not -inf, which would give NaN in a row without a True entry.
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=1).masked_fill(~mask, 0)


def partial_label_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, form: CandidateForm = "cc", leverage: float = 2.0
) -> Tensor:
    """Partial-label losses (CPL, section 4; the forms of the literature). With one candidate, cc, rc and cav are plain
    cross entropy.

    With the labels y of an image (1 for every candidate, or soft) and its candidates S:

    cc: -log sum_{c in S} y_c p_c (classifier-consistent: Feng et al., NeurIPS 2020; soft labels as in CPL's code).
    rc, cav: -sum_{c in S} w_c log p_c.
    lw: -sum_{c in S} w_c log p_c - leverage * sum_{c not in S} w_c log(1 - p_c), the form with cross entropy.

    Args:
        logits: (B, C).
        labels: (B, C) bool, True for candidates, or soft labels that sum to 1; at least one above 0 a row.
        weights: (B, C) of `candidate_weights` for the same form; not used by cc. They get no gradient.
        form: cc, rc, lw or cav.
        leverage: weight of the classes that are no candidates, at least 0; used by lw alone. CPL's code has 2.

    Returns:
        The mean over the batch, at least 0.

    Raises:
        ValueError: the form needs weights and there are none.
    """
    log_probs, mask = logits.log_softmax(dim=1), labels > 0
    if form == "cc":
        weighted = log_probs if labels.dtype == torch.bool else log_probs + labels.log()
        return -weighted.masked_fill(~mask, float("-inf")).logsumexp(dim=1).mean()
    if weights is None:
        raise ValueError(f"the form {form} needs weights; see candidate_weights")
    weights = weights.detach()
    loss = -(weights * log_probs).masked_fill(~mask, 0).sum(dim=1)
    if form == "lw":
        loss = loss - leverage * (weights * _log_complement(log_probs)).masked_fill(mask, 0).sum(dim=1)
    return loss.mean()


def _log_complement(log_probs: Tensor) -> Tensor:
    """log(1 - p) of (B, C) log p, with full precision and a finite gradient where p rounds to 1.

    Where p_c is at most a half, log(1 - p_c) is computed directly. Only the largest class of a row can have more; for
    it the probabilities of the other classes are summed.
    """
    top = log_probs.argmax(dim=1, keepdim=True)
    others = log_probs.scatter(1, top, float("-inf")).logsumexp(dim=1, keepdim=True)
    rest = torch.log1p(-log_probs.clamp(max=-0.5).exp())
    return rest.scatter(1, top, others)


def consistency_loss(logits_a: Tensor, logits_b: Tensor) -> Tensor:
    """Symmetric KL divergence between the predictions p, q for two views of the same images (AiR, L_s).

        L_s = mean over the batch of (KL(p || q) + KL(q || p)) / 2

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
    """-log p_label, mean over a batch of generated images, whose class is known (AiR, the form `synthetic` of L_s).

    Args:
        logits: (B, C).
        label: (B,) class indices, 0..C-1.
    """
    return F.cross_entropy(logits, label)
