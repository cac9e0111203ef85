"""Learned prompts: context tokens before, around or after class names (CoOp, UPL)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from air_plugin.functional.similarity import cosines
from air_plugin.utils.class_names import listed
from air_plugin.utils.errors import UserError
from air_plugin.utils.files import to_json

if TYPE_CHECKING:
    from air_plugin.clip.backbone import Backbone
    from air_plugin.clip.shared_prefix import Layout

Position = Literal["end", "middle", "front"]


class SavedPrompts(nn.Module):
    """Learned prompts whose state dict names the backbone and the classes that they were trained with.

    other_names_allowed: whether weights that were trained with other class names may be loaded. Only prompts that all
        classes share serve them (base-to-new and cross-dataset evaluation); training is never resumed with it.
    trained_names: of the weights that were loaded; empty where none were.
    """

    other_names_allowed = False
    trained_names: Sequence[str] = ()

    def __init__(self, backbone: Backbone, classnames: Sequence[str]) -> None:
        super().__init__()
        self.identity = {"backbone": backbone.fingerprint, "classes": list(classnames)}

    @property
    def class_specific(self) -> bool:
        """Whether every class has prompts of its own."""
        return False

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(to_json(self.identity).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        saved = json.loads(bytes(state.cpu().tolist()))
        others = saved["classes"] != self.identity["classes"]
        if others and (self.class_specific or not self.other_names_allowed):
            why = "; class-specific contexts (TRAINER.PROMPT.CSC) serve no other classes" if self.class_specific else ""
            raise UserError(
                f"the checkpoint is of other classes ({_brief(saved['classes'])}) than this run's "
                f"({_brief(self.identity['classes'])}){why}; use another output folder or --model-dir"
            )
        if saved["backbone"] != self.identity["backbone"]:
            raise UserError(
                "the checkpoint is of another backbone than this run's; use another output folder or --model-dir"
            )
        self.trained_names = saved["classes"]


class PromptLearner(SavedPrompts):
    """Learned context vectors v and fixed class names: prompt_c = [v_1 .. v_n, name_c] (CoOp, section 3.1, eq. 2).

    ctx: (n, W), or (C, n, W) with class-specific contexts (CSC); the only parameter.
    """

    fixed: Tensor
    order: Tensor
    end: Tensor
    packed_fixed: Tensor
    packed_order: Tensor

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        *,
        n_ctx: int = 16,
        ctx_init: str = "",
        class_specific: bool = False,
        position: Position = "end",
        generator: torch.Generator | None = None,
    ) -> None:
        """Make the learner.

        Args:
            backbone: whose tokens, embeddings and context length are used.
            classnames: C names.
            n_ctx: number of context tokens, initialised from N(0, 0.02^2), where `ctx_init` is empty.
            ctx_init: words whose embeddings are the initial context, for instance "a photo of a".
            class_specific: one context for each class (CSC).
            position: of the class name in the prompt: end, middle or front.
            generator: of the initial context.

        Raises:
            UserError: a prompt is longer than the context length.
        """
        super().__init__(backbone, classnames)
        embedding = backbone.text_encoder.token_embedding
        device = embedding.weight.device
        names = [name.replace("_", " ") for name in classnames]
        start = int(backbone.ends(backbone.tokenize([""])))  # tokens before a text: 1 in CLIP, none in SigLIP
        if ctx_init:
            words = backbone.tokenize([ctx_init.replace("_", " ")])
            context = embedding(words[0, start : int(backbone.ends(words))].to(device)).detach().float()
        else:
            context = torch.empty(n_ctx, embedding.weight.shape[1]).normal_(std=0.02, generator=generator).to(device)
        n_ctx = len(context)
        if class_specific:
            context = context.expand(len(names), -1, -1)
        self.ctx = nn.Parameter(context.clone())

        before = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]
        tokens, order, end = _arrangement(backbone, names, n_ctx=n_ctx, before=before, start=start)
        with torch.no_grad():
            fixed = embedding(tokens.to(device)).detach()
        self.register_buffer("fixed", fixed, persistent=False)  # (C, L, W): start, name, full stop, end, padding
        self.register_buffer("order", order.to(device), persistent=False)
        self.register_buffer("end", end.to(device), persistent=False)
        self.length = int(end.max()) + 1  # of the longest prompt
        shared = start + before if before and not class_specific else 0
        self.layout = backbone.text_encoder.layout(end.tolist(), prefix=shared)
        if self.layout is not None:
            self._pack(self.layout)

    @property
    def class_specific(self) -> bool:
        return self.ctx.ndim == 3

    def _pack(self, layout: Layout) -> None:
        """Prepare `packed`: the fixed tokens in the layout's order, and which of them are the context's instead."""
        prompt, place = layout.source // self.order.shape[1], layout.source % self.order.shape[1]
        source, length = self.order[prompt, place], self.fixed.shape[1]
        learned, count = source >= length, len(source)
        fixed = self.fixed[prompt, source.clamp(max=length - 1)].masked_fill(learned[:, None], 0)
        order = torch.where(learned, count + source - length, torch.arange(count, device=source.device))
        self.register_buffer("packed_fixed", fixed, persistent=False)  # (N, W)
        self.register_buffer("packed_order", order, persistent=False)  # (N,) in the N fixed tokens and the context

    def packed(self, context: Tensor | None = None) -> Tensor:
        """(1, N, W) embeddings of the tokens in `layout`; only where there is a layout. context: in place of `ctx`."""
        context = self.ctx if context is None else context
        pool = torch.cat([self.packed_fixed, context.to(self.packed_fixed.dtype)])  # (N + n, W)
        return pool.index_select(0, self.packed_order)[None]

    def forward(self, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The (C, L, W) embeddings of all prompts and the (C,) positions of their end-of-text tokens.

        context: in place of `ctx`, of the same shape.
        """
        context = self.ctx if context is None else context
        context = context if context.ndim == 3 else context.expand(len(self.fixed), -1, -1)
        pool = torch.cat([self.fixed, context.to(self.fixed.dtype)], dim=1)  # (C, L + n, W)
        return pool.gather(1, self.order[..., None].expand(-1, -1, pool.shape[2])), self.end


class PromptEnsemble(nn.Module):
    """E prompt learners that are trained together, independently of each other (UPL, prompt ensemble)."""

    members: Any

    def __init__(self, members: Sequence[PromptLearner]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.length = max(member.length for member in members)
        ends = [(member.layout is None or member.layout.prefix, member.end.tolist()) for member in members]
        self.layout = members[0].layout if all(end == ends[0] for end in ends) else None

    def packed(self) -> Tensor:
        """(E, N, W) embeddings of the tokens in `layout`, a set for each member; only where there is a layout."""
        return torch.cat([member.packed() for member in self.members])

    def forward(self) -> tuple[Tensor, Tensor]:
        """(E * C, L, W) embeddings and (E * C,) end positions: those of the members, concatenated."""
        prompts, ends = zip(*(member() for member in self.members), strict=True)
        return torch.cat(prompts), torch.cat(ends)


class PromptedCLIP(nn.Module):
    """Learned prompts with a frozen backbone, applied to image features. E is 1 where there is no ensemble."""

    def __init__(self, backbone: Backbone, prompt_learner: nn.Module) -> None:
        super().__init__()
        self.prompt_learner = prompt_learner
        self.members = len(getattr(prompt_learner, "members", [None]))
        self.text_encoder = backbone.text_encoder
        self.logit_scale = backbone.logit_scale

    def text_features(self) -> Tensor:
        """(E, C, D) unit features of the current prompts."""
        learner: Any = self.prompt_learner
        if learner.layout is None:
            flat = self.text_encoder(*learner(), length=learner.length)
        else:
            flat = self.text_encoder.encode_packed(learner.packed(), learner.layout)
        flat = nn.functional.normalize(flat.float(), dim=1)
        return flat.unflatten(0, (self.members, -1))

    def logits(self, features: Tensor, text: Tensor) -> Tensor:
        """(E * B, D) image features, B for each member, and (E, C, D) text features to (E * B, C) logits s f t."""
        images = features.unflatten(0, (len(text), -1))
        return self.logit_scale * cosines(images, text).flatten(0, 1)

    @property
    def loss_scale(self) -> float:
        """What a loss is multiplied with in training, and gradients are divided by."""
        return 1.0

    def encode_batch(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch as losses take it: its images as (B, D) unit features, which they are already here."""
        return batch

    def encode(self, images: Any) -> Tensor:
        """(N, D) unit features of the `plain` images of a table that the prompts are trained on."""
        return images

    def forward(self, images: Any) -> Tensor:
        """Images, as `encode` takes them, to (B, C) logits; of an ensemble, log of the members' mean probabilities."""
        features, text = self.encode(images), self.text_features()
        if len(text) == 1:
            return self.logits(features, text)
        return torch.stack([self.logits(features, one[None]).softmax(dim=1) for one in text]).mean(dim=0).log()


def _brief(names: Sequence[str]) -> str:
    return f"{len(names)}: {listed(names, first=3)}"


def _arrangement(
    backbone: Backbone, names: Sequence[str], *, n_ctx: int, before: int, start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The fixed tokens of the prompts, and the source of each token: the fixed tokens (0..L-1) or the context (L..).

    Args:
        backbone: whose tokenizer and context length L are used.
        names: of the C classes.
        n_ctx: number of context tokens n.
        before: how many of them precede the name.
        start: number of tokens before a text.

    Returns:
        (C, L) token ids, (C, L) sources and (C,) positions of the end-of-text tokens. The context replaces padding, so
        that the token in the last position stays the same for a tower that pools it.

    Raises:
        UserError: a prompt is longer than the context length.
    """
    length = backbone.context_length
    # A word before the name, left out below: some tokenizers encode a word differently at the beginning of a text.
    lead = "a " if before else ""
    first = int(backbone.ends(backbone.tokenize([lead.strip()])))
    tokens = backbone.tokenize([f"{lead}{name}." for name in names])
    ends = backbone.ends(tokens).tolist()
    # The full stop is one token, or none: SigLIP's tokenizer drops it.
    stops = backbone.ends(backbone.tokenize([f"{lead}{name}" for name in names])).tolist()
    context = range(length, length + n_ctx)
    rows, positions = [], []
    for name, stop, end in zip(names, stops, ends, strict=True):
        stop = min(stop, end)
        row = [*range(start), *context[:before], *range(first, stop), *context[before:], *range(stop, end + 1)]
        if len(row) > length:
            raise UserError(
                f"{n_ctx} context tokens and class name '{name}' are longer than the {length} tokens of the backbone"
            )
        positions.append(len(row) - 1)
        rows.append([*row, *range(len(row), length)])  # a prompt is at least as long as its fixed tokens
    return tokens, torch.tensor(rows), torch.tensor(positions)
