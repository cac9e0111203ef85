"""BLIP-2's image-text model with its Q-Former, behind the names of transformers' dual encoders.

Its Q-Former makes several vectors of an image (32 in the published models), and the score of a text is the largest of
their cosines (contrastive head; Li et al., "BLIP-2", ICML 2023, section 3.1). All vectors are kept, as one row an image
(`functional.similarity`): every table, store and classifier of image features takes them as they are, and the text head
computes the exact score. One vector an image would be smaller, and would give other predictions than BLIP-2's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from air_plugin.utils.errors import UserError

ARCHITECTURE = "Blip2ForImageTextRetrieval"
TEMPERATURE = 0.07  # the value with which BLIP-2's training begins; transformers' class has none


def require_contrastive_head(name: str, config: Any) -> None:
    """Raise a UserError where a BLIP-2, by its configuration, is not the model that compares images and texts."""
    if ARCHITECTURE not in (config.architectures or []) or not config.qformer_config.use_qformer_text_input:
        found = ", ".join(config.architectures or []) or "no named architecture"
        raise UserError(
            f"backbone '{name}' is a BLIP-2 ({found}) without the head that compares images and texts; take a "
            f"{ARCHITECTURE}, for instance Salesforce/blip2-itm-vit-g"
        )


class BLIP2DualEncoder(nn.Module):
    """transformers' Blip2ForImageTextRetrieval as a dual encoder.

    logit_scale: log(1 / 0.07). The logits are the cosines, transformers' logits_per_image, times its exponential.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.logit_scale = nn.Parameter(torch.tensor(1 / TEMPERATURE).log())
        self.config = SimpleNamespace(text_config=model.config.qformer_config)

    @property
    def vision_model(self) -> nn.Module:
        return self.model.vision_model

    @property
    def text_model(self) -> Any:
        """What gives the token embedding."""
        return self.model

    def get_image_features(self, *, pixel_values: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, Q D): Q unit vectors of D numbers, one after the other, over sqrt(Q)."""
        states = self.model.vision_model(pixel_values=pixel_values).last_hidden_state
        queries = self.model.query_tokens.expand(states.shape[0], -1, -1)
        mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        found = self.model.qformer(query_embeds=queries, encoder_hidden_states=states, encoder_attention_mask=mask)
        projection = self.model.vision_projection
        features = projection(found.last_hidden_state.to(projection.weight.dtype))
        return nn.functional.normalize(features.float(), dim=2).flatten(1) / features.shape[1] ** 0.5

    def get_text_features(self, *, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(T, L) to (T, D), not normalised: the first token's."""
        embeddings, place = self.model.embeddings, torch.arange(input_ids.shape[1], device=input_ids.device)
        tokens = embeddings.word_embeddings(input_ids) + embeddings.position_embeddings(place)
        found = self.model.qformer(query_embeds=tokens, query_length=0, attention_mask=attention_mask)
        projection = self.model.text_projection
        return projection(found.last_hidden_state[:, 0].to(projection.weight.dtype))
