"""Labelled images beside the unlabelled ones, and what they mean for the auxiliary classifier (ssl, trzsl)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from air_plugin.functional.pseudo_labels import possible


@dataclass(frozen=True)
class Supervision:
    """The labelled images, and the classes that an unlabelled image may have.

    A labelled image is treated as an unlabelled one whose class is certain: its probabilities are one-hot. So EM and
    real prototypes use it without rules of their own.

    paths: L image files.
    features: (L, D) unit features of the frozen backbone.
    labels: (L,) classes.
    classes: (U,) of the unlabelled images, ascending; None: all.
    """

    paths: Sequence[str]
    features: Tensor
    labels: Tensor
    classes: Tensor | None = None

    def allowed(self, probs: Tensor) -> Tensor:
        """(N, C) probabilities of unlabelled images, renormalised over the classes that they may have; else 0."""
        return possible(probs, self.classes)

    def joined(self, features: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Features and probabilities of the N unlabelled images, then of the L labelled ones.

        Args:
            features: (N, D) of the unlabelled images.
            probs: (N, C).

        Returns:
            (N + L, D) and (N + L, C); rows sum to 1.
        """
        given = torch.nn.functional.one_hot(self.labels, probs.shape[1]).to(probs)
        return torch.cat([features, self.features.to(features)]), torch.cat([self.allowed(probs), given])
