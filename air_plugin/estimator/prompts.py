"""Prompts trained on the fused pseudo-labels (AiR over CPL), in a short loop of its own: no Dassl is needed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from air_plugin.auxiliary.build import Auxiliary
from air_plugin.clip.backbone import Backbone
from air_plugin.clip.features import FeatureBatches
from air_plugin.clip.prompts import PromptedCLIP, PromptLearner
from air_plugin.clip.zero_shot import UnlabelledImages
from air_plugin.config import merge_file, own_config, read_yaml
from air_plugin.functional.fusion import fuse
from air_plugin.functional.losses import partial_label_loss, synthetic_loss
from air_plugin.functional.pseudo_labels import candidate_sets
from air_plugin.inference.bundle import preprocessing_of
from air_plugin.utils.progress import Progress
from air_plugin.utils.seeding import stable_seed
from air_plugin.utils.store import Store
from air_plugin.utils.tensors import save_tensors, tensor_digest

FILE = "text.safetensors"
FOLDER = Path(__file__).with_name("training")
EMBEDDED, PUBLISHED = ("mini_training", "mini"), ("cpl_training", "published")
VIEWS = 8  # of an image, the first of them not augmented


@dataclass(frozen=True)
class Training:
    """CPL's settings of training, as the files in training/ have them, which configs/shared has, too.

    Where a file names none, weight_decay, momentum and crop are Dassl's.

    clip_grad: largest norm of the gradient; 0 is no limit.
    crop: smallest share of an image that an augmented view shows.
    flip: whether views may be mirrored.
    alpha, beta, per_class: of the candidate sets; see `candidate_sets`. Elsewhere alpha and beta are the data set's.
    """

    lr: float
    epochs: int
    batch: int
    alpha: float
    beta: float
    per_class: int
    weight_decay: float = 5e-4
    momentum: float = 0.9
    clip_grad: float = 0.0
    crop: float = 0.08
    flip: bool = True


@functools.cache
def read_training(training: str, images: str) -> Training:
    """The settings in two files of training/, for instance "cpl_training" and "published"."""
    cfg = own_config(0)
    merge_file(cfg, FOLDER / f"{training}.yaml", sections=("TRAINER",))
    found, views = (read_yaml((FOLDER / f"{name}.yaml").read_text("utf-8")) for name in (training, images))
    optim, cpl = found["OPTIM"], cfg.TRAINER.CPL
    given = {"weight_decay": optim.get("WEIGHT_DECAY"), "momentum": optim.get("MOMENTUM")}
    given["crop"] = views["INPUT"].get("RRCROP_SCALE", "").strip("()").partition(",")[0]
    return Training(
        lr=float(optim["LR"]),
        epochs=int(optim["MAX_EPOCH"]),
        batch=int(found["DATALOADER"]["TRAIN_X"]["BATCH_SIZE"]),
        alpha=cpl.ALPHA,
        beta=cpl.BETA,
        per_class=cpl.PER_CLASS,
        clip_grad=cfg.TRAINER.PROMPT.CLIP_GRAD,
        flip="random_flip" in views["INPUT"]["TRANSFORMS"],
        **{name: float(text) for name, text in given.items() if text},
    )


def training_of(backbone: Backbone) -> Training:
    """The settings for a backbone: those of the embedded ones, or the published ones."""
    return read_training(*(EMBEDDED if backbone.name.startswith("mini") else PUBLISHED))


def views_of(backbone: Backbone, *, seed: int) -> dict[str, Any]:
    """The arguments of `extract_features` for a table that prompts are trained on: augmented views of every image.

    Args:
        backbone: whose size, mean and standard deviation the views have.
        seed: of the augmentation.
    """
    from torchvision import transforms

    training, preparation, size = training_of(backbone), preprocessing_of(backbone), backbone.image_size
    bicubic = transforms.InterpolationMode.BICUBIC
    steps = [transforms.RandomResizedCrop(size, scale=(training.crop, 1.0), interpolation=bicubic)]
    steps += [transforms.RandomHorizontalFlip()] * training.flip
    steps += [transforms.ToTensor(), transforms.Normalize(preparation["mean"], preparation["std"])]
    return {"views": VIEWS, "augment": transforms.Compose(steps), "seed": seed}


def train_prompts(
    backbone: Backbone,
    classnames: Sequence[str],
    unlabelled: UnlabelledImages,
    auxiliary: Auxiliary,
    *,
    template: str,
    seed: int,
    store: Store,
) -> Tensor:
    """Train one context for all classes with L = L_r + L_s, L_s on kept generated images; the result is kept.

    Args:
        backbone: frozen.
        classnames: C names.
        unlabelled: N images, with the views of `views_of`.
        auxiliary: of the fused pseudo-labels, and of the generated images.
        template: the words before its {} are the initial context; 16 random tokens where there are none.
        seed: of that context, the order of the images and the choice of generated ones.
        store: of the result.

    Returns:
        (1, C, D) unit text features.
    """
    training = training_of(backbone)
    classifier = auxiliary.classifier
    probs = fuse(unlabelled.probs, classifier.probs(unlabelled.features), weight=classifier.fusion_weight)
    generated = auxiliary.prototypes.features  # (C, K, D)
    context = template.partition("{}")[0].strip()
    settings = {
        "recipe": 1,
        "inputs": tensor_digest({"probs": probs, "features": unlabelled.table.features, "generated": generated}),
        "backbone": backbone.fingerprint,
        "classes": list(classnames),
        "context": context,
        "seed": seed,
        **asdict(training),
    }
    with store.open("prompts", settings) as entry:
        if not entry.complete:
            rng = torch.Generator().manual_seed(stable_seed("context", seed))
            learner = PromptLearner(backbone, classnames, ctx_init=context, generator=rng)
            model = PromptedCLIP(backbone, learner)
            _train(model, unlabelled, probs, generated, training, seed=seed)
            with torch.no_grad():
                save_tensors(entry.path / FILE, {"text": model.text_features().cpu()})
            entry.finish([FILE])
        return entry.tensors(FILE)["text"].to(backbone.device)


def _train(
    model: PromptedCLIP,
    unlabelled: UnlabelledImages,
    probs: Tensor,
    generated: Tensor,
    training: Training,
    *,
    seed: int,
) -> None:
    """Train the context of a model on (N, C) fused probabilities and (C, K, D) generated features."""
    chosen = candidate_sets(probs, alpha=training.alpha, beta=training.beta, per_class=training.per_class)
    parameters = list(model.prompt_learner.parameters())
    optimiser = torch.optim.SGD(
        parameters, lr=training.lr, momentum=training.momentum, weight_decay=training.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, training.epochs)
    rng = torch.Generator().manual_seed(stable_seed("synthetic", seed))
    with Progress(training.epochs, title="prompts", unit="epochs") as progress, torch.enable_grad():
        batches = FeatureBatches(
            unlabelled.table,
            chosen.index,
            {"target": chosen.mask},
            batch_size=training.batch,
            seed=seed,
            epoch=lambda: progress.done,
        )
        while progress.done < training.epochs:
            loss = torch.zeros(())
            for batch in batches:
                loss = _loss(model, batch, generated, rng)
                optimiser.zero_grad()
                loss.backward()
                if training.clip_grad:
                    nn.utils.clip_grad_norm_(parameters, training.clip_grad)
                optimiser.step()
            schedule.step()
            progress.update(loss=float(loss.detach()))


def _loss(model: PromptedCLIP, batch: dict[str, Tensor], generated: Tensor, rng: torch.Generator) -> Tensor:
    """L_r of a batch of B images plus L_s of B generated ones, which are sampled from (C, K, D) features."""
    flat, kept = generated.flatten(0, 1), generated.shape[1]
    pick = torch.randint(len(flat), (len(batch["img"]),), generator=rng).to(flat.device)
    text = model.text_features()
    real = partial_label_loss(model.logits(batch["img"], text), batch["target"])
    return real + synthetic_loss(model.logits(flat[pick], text), pick // kept)
