"""Trainers of the shapes that CoOp's family has, as other people's files hold them; none of them refers to AiR.

CoOp: prompts for all images, `forward(image)` gives logits. CoCoOp: prompts of each image, a loss while training.
KgCoOp: a pair of logits and score. MaPLe: an image encoder that takes prompts beside the pixels, the whole model is
registered. VPT: trained prompts within the image encoder, which takes pixels alone. Headless: no `image_encoder`.
All are over the small embedded CLIP. Attribute and method names are those of the originals, for these are the contract.
"""

from __future__ import annotations

import dassl_small  # noqa: F401  it finds dassl, and registers the data sets
import torch
from dassl.engine import TrainerX
from dassl.metrics import compute_accuracy
from dassl.optim import build_lr_scheduler, build_optimizer
from torch import nn
from torch.nn import functional as F

from air_plugin.clip.loading import load_backbone

WORDS = 2  # learned context vectors


def load_clip(cfg):
    """Their own loader of the frozen model."""
    return load_backbone(cfg.MODEL.BACKBONE.NAME)


class TextTower(nn.Module):
    """(C, L, W) prompts to (C, D) features."""

    def __init__(self, clip):
        super().__init__()
        self.clip = clip.model

    def forward(self, prompts, tokens):
        x = prompts + self.clip.positional_embedding[: prompts.shape[1]]
        x = self.clip.ln_final(self.clip.transformer(x, attn_mask=self.clip.attn_mask))
        return x[torch.arange(len(x)), tokens.argmax(dim=1)] @ self.clip.text_projection


class Prompts(nn.Module):
    """Learned words before the class name; called with nothing, or with a shift of the words for each image."""

    def __init__(self, cfg, classnames, clip):
        super().__init__()
        blanks = " ".join(["X"] * WORDS)
        self.tokens = clip.tokenize([f"{blanks} {name}." for name in classnames])
        with torch.no_grad():
            embedded = clip.model.token_embedding(self.tokens)
        self.ctx = nn.Parameter(torch.randn(WORDS, embedded.shape[2]) * 0.02)  # the global generator, as in CoOp
        self.register_buffer("token_prefix", embedded[:, :1])
        self.register_buffer("token_suffix", embedded[:, 1 + WORDS :])

    def forward(self, ctx=None):
        ctx = (self.ctx if ctx is None else ctx).expand(len(self.tokens), -1, -1)
        return torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1)


class CoOpModel(nn.Module):
    def __init__(self, cfg, classnames, clip):
        super().__init__()
        self.prompt_learner = Prompts(cfg, classnames, clip)
        self.image_encoder = clip.model.visual
        self.text_encoder = TextTower(clip)
        self.logit_scale = clip.model.logit_scale
        self.dtype = torch.float32

    def scaled(self, image_features, text_features):
        image_features = F.normalize(image_features, dim=-1)
        return self.logit_scale.exp() * image_features @ F.normalize(text_features, dim=-1).t()

    def forward(self, image):
        features = self.image_encoder(image.type(self.dtype))
        return self.scaled(features, self.text_encoder(self.prompt_learner(), self.prompt_learner.tokens))


class CoOpShape(TrainerX):
    """Trains what `trained` names; the checkpoint holds what `registered` gives."""

    network = CoOpModel
    trained = "prompt_learner"
    registered = "prompt_learner"

    def build_model(self):
        self.model = self.network(self.cfg, self.dm.dataset.classnames, load_clip(self.cfg))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.trained in name)
        part = self.model if self.registered == "" else getattr(self.model, self.registered)
        self.model.to(self.device)
        self.optim = build_optimizer(part, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model(self.registered or "whole_model", part, self.optim, self.sched)

    def parse_batch_train(self, batch):
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def forward_backward(self, batch):
        image, label = self.parse_batch_train(batch)
        loss, summary = self.loss(image, label)
        self.model_backward_and_update(loss)
        if self.batch_idx + 1 == self.num_batches:
            self.update_lr()
        return {"loss": loss.item(), **summary}

    def loss(self, image, label):
        output = self.model(image)
        return F.cross_entropy(output, label), {"acc": compute_accuracy(output, label)[0].item()}


class CoCoOpModel(CoOpModel):
    def __init__(self, cfg, classnames, clip):
        super().__init__(cfg, classnames, clip)
        width = self.prompt_learner.ctx.shape[1]
        self.prompt_learner.meta_net = nn.Linear(clip.model.visual.output_dim, width)

    def forward(self, image, label=None):
        features = F.normalize(self.image_encoder(image.type(self.dtype)), dim=-1)
        learner = self.prompt_learner
        rows = []
        for one, shift in zip(features, learner.meta_net(features), strict=True):
            rows.append(self.scaled(one[None], self.text_encoder(learner(learner.ctx + shift), learner.tokens))[0])
        logits = torch.stack(rows)
        return F.cross_entropy(logits, label) if learner.training else logits


class CoCoOpShape(CoOpShape):
    network = CoCoOpModel

    def loss(self, image, label):
        return self.model(image, label), {}


class KgCoOpModel(CoOpModel):
    def __init__(self, cfg, classnames, clip):
        super().__init__(cfg, classnames, clip)
        self.fixed = F.normalize(clip.encode_texts([f"a photo of a {name}." for name in classnames]), dim=-1)

    def forward(self, image):
        features = self.image_encoder(image.type(self.dtype))
        text = self.text_encoder(self.prompt_learner(), self.prompt_learner.tokens)
        score = 1 - (F.normalize(text, dim=-1) * self.fixed).sum(dim=-1).mean()
        return self.scaled(features, text), score


class KgCoOpShape(CoOpShape):
    network = KgCoOpModel

    def loss(self, image, label):
        output, score = self.model(image)
        return F.cross_entropy(output, label) + 8.0 * score, {}

    def model_inference(self, input):
        return self.model(input)[0]


class PromptedTower(nn.Module):
    """An image encoder that takes prompts beside the pixels."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual

    def forward(self, image, shared_ctx, deep_prompts):
        return self.visual(image) + shared_ctx.mean(dim=0) + sum(deep.mean(dim=0) for deep in deep_prompts)


class MaPLePrompts(Prompts):
    def __init__(self, cfg, classnames, clip):
        super().__init__(cfg, classnames, clip)
        width = clip.model.visual.output_dim
        self.proj = nn.Linear(self.ctx.shape[1], width)
        self.deep = nn.ParameterList([torch.randn(WORDS, width) * 0.02])

    def forward(self):
        return super().forward(), self.proj(self.ctx), [], list(self.deep)


class MaPLeModel(CoOpModel):
    def __init__(self, cfg, classnames, clip):
        super().__init__(cfg, classnames, clip)
        self.prompt_learner = MaPLePrompts(cfg, classnames, clip)
        self.image_encoder = PromptedTower(clip.model.visual)

    def forward(self, image, label=None):
        prompts, shared_ctx, _, deep_prompts = self.prompt_learner()
        text = self.text_encoder(prompts, self.prompt_learner.tokens)
        logits = self.scaled(self.image_encoder(image.type(self.dtype), shared_ctx, deep_prompts), text)
        return F.cross_entropy(logits, label) if self.prompt_learner.training else logits


class MaPLeShape(CoCoOpShape):
    network = MaPLeModel
    registered = ""


class PromptsWithin(nn.Module):
    """An image encoder with prompts of its own, and a batch norm, whose running statistics a careless look changes."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.VPT = nn.Parameter(torch.randn(visual.output_dim) * 0.02)
        self.norm = nn.BatchNorm1d(visual.output_dim)

    def forward(self, image):
        return self.norm(self.visual(image) + self.VPT)


class VPTModel(CoOpModel):
    def __init__(self, cfg, classnames, clip):
        super().__init__(cfg, classnames, clip)
        self.image_encoder = PromptsWithin(clip.model.visual)


class VPTShape(CoOpShape):
    network = VPTModel
    trained = "VPT"
    registered = ""


class HeadlessModel(nn.Module):
    def __init__(self, cfg, classnames, clip):
        super().__init__()
        self.tower = clip.model.visual
        self.head = nn.Linear(clip.model.visual.output_dim, len(classnames))

    def forward(self, image):
        return self.head(F.normalize(self.tower(image), dim=-1))


class HeadlessShape(CoOpShape):
    network = HeadlessModel
    trained = registered = "head"


class PLOTModel(CoOpModel):
    """Its encoder gives the features of the image, then those of its parts."""

    def __init__(self, cfg, classnames, clip):
        super().__init__(cfg, classnames, clip)
        self.image_encoder = Parts(clip.model.visual)

    def forward(self, image):
        first, *others = self.image_encoder(image.type(self.dtype))
        text = self.text_encoder(self.prompt_learner(), self.prompt_learner.tokens)
        return sum(self.scaled(part, text) for part in [first, *others]) / (1 + len(others))


class Parts(nn.Module):
    def __init__(self, visual):
        super().__init__()
        self.visual = visual

    def forward(self, image):
        return self.visual(image), self.visual(image.flip(3)), self.visual(image.flip(2))


class PLOTShape(CoOpShape):
    network = PLOTModel


class UPLModel(CoOpModel):
    def forward(self, image):
        features = self.image_encoder(image.type(self.dtype))
        text = self.text_encoder(self.prompt_learner(), self.prompt_learner.tokens)
        return self.scaled(features, text), features, text


class UPLShape(CoOpShape):
    """Its inference gives a tuple, which its test takes apart."""

    network = UPLModel

    def loss(self, image, label):
        return F.cross_entropy(self.model(image)[0], label), {}

    @torch.no_grad()
    def test(self, split=None):
        self.set_model_mode("eval")
        self.evaluator.reset()
        for batch in self.test_loader:
            image, label = self.parse_batch_test(batch)
            output, _, _ = self.model_inference(image)
            self.evaluator.process(output, label)
        return self.evaluator.evaluate()["accuracy"]


class ZeroshotShape(TrainerX):
    """Has no `model`, registers none, and is not trained."""

    def build_model(self):
        self.clip_model = load_clip(self.cfg).model.to(self.device)
        names = self.dm.dataset.classnames
        with torch.no_grad():
            text = load_clip(self.cfg).encode_texts([f"a photo of a {name}." for name in names])
        self.text_features = F.normalize(text, dim=-1)

    def model_inference(self, image):
        features = F.normalize(self.clip_model.encode_image(image), dim=-1)
        return self.clip_model.logit_scale.exp() * features @ self.text_features.t()
