"""An ensemble of prompts is nothing but its members, trained side by side."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from air_plugin.clip.backbone import Backbone
from air_plugin.clip.prompts import PromptedCLIP, PromptEnsemble, PromptLearner

NAMES = ["river", "forest", "sea or lake"]


def learner(backbone: Backbone, seed: int) -> PromptLearner:
    return PromptLearner(backbone, NAMES, n_ctx=3, generator=torch.Generator().manual_seed(seed))


def images(backbone: Backbone, count: int, seed: int) -> torch.Tensor:
    width = backbone.encode_texts(["a"]).shape[1]
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def trained(model: PromptedCLIP, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    optimiser = torch.optim.SGD(model.prompt_learner.parameters(), lr=0.1, momentum=0.9)
    for features, target in batches:
        loss = F.cross_entropy(model.logits(features, model.text_features()), target) * model.members
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def test_training_side_by_side_equals_training_one_after_another(tiny_backbone: Backbone) -> None:
    target = torch.tensor([0, 1, 2, 1])
    single = [[(images(tiny_backbone, 4, 10 * member + step), target) for step in range(3)] for member in range(3)]
    alone = [PromptedCLIP(tiny_backbone, learner(tiny_backbone, seed)) for seed in range(3)]
    for model, batches in zip(alone, single, strict=True):
        trained(model, batches)
    together = PromptedCLIP(tiny_backbone, PromptEnsemble([learner(tiny_backbone, seed) for seed in range(3)]))
    joint = [(torch.cat([single[m][step][0] for m in range(3)]), target.repeat(3)) for step in range(3)]
    trained(together, joint)
    for member, model in zip(together.prompt_learner.members, alone, strict=True):
        assert not torch.equal(member.ctx, learner(tiny_backbone, 0).ctx)
        assert torch.allclose(member.ctx, model.prompt_learner.ctx, atol=1e-5)

    pixels = images(tiny_backbone, 5, 99)
    mean = torch.stack([model(pixels).softmax(dim=1) for model in alone]).mean(dim=0)
    assert torch.allclose(together(pixels).softmax(dim=1), mean, atol=1e-5)


def test_one_prompt_gives_plain_logits(tiny_backbone: Backbone) -> None:
    model = PromptedCLIP(tiny_backbone, learner(tiny_backbone, 0))
    pixels, text = images(tiny_backbone, 5, 1), model.text_features()
    assert text.shape == (1, 3, pixels.shape[1])
    assert torch.allclose(model(pixels), tiny_backbone.logit_scale * pixels @ text[0].T)


def test_a_member_of_other_classes_is_refused(tiny_backbone: Backbone) -> None:
    from air_plugin.utils.errors import UserError

    saved = PromptEnsemble([learner(tiny_backbone, seed) for seed in range(2)]).state_dict()
    other = PromptEnsemble([PromptLearner(tiny_backbone, ["a", "b", "c"], n_ctx=3) for _ in range(2)])
    with pytest.raises(UserError, match="other classes"):
        other.load_state_dict(saved)
