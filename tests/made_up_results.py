"""Results on disk that no run made, for tests of tables and pages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_pictures(root: Path, dataset: str, count: int, *, size: tuple[int, int] = (8, 8)) -> list[str]:
    """Picture files below `<root>/<dataset>`; returns their paths relative to `root`."""
    rng = np.random.default_rng(0)
    (root / dataset).mkdir(parents=True, exist_ok=True)
    names = [f"{dataset}/{number:03d}.png" for number in range(count)]
    for name in names:
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)
    return names


def write_run(
    output: Path,
    classnames: Sequence[str],
    labels: Sequence[int],
    predicted: Mapping[str, Sequence[int]],
    *,
    images: Sequence[str] | None = None,
    confidence: Sequence[float] | None = None,
    dataset: str = "digits",
    trainer: str = "AiR",
    config: str = "mini",
    seed: int = 1,
    settings: Mapping[str, Any] | None = None,
    gallery: bool = False,
    seen: Sequence[int] | None = None,
    **changes: Any,
) -> Path:
    """The folder of a finished run whose heads predicted this; its metrics fit.

    Args:
        output: the scripts' OUTPUT; pictures lie in `data` beside it.
        classnames: C names.
        labels: N true classes.
        predicted: head -> N classes.
        images: N paths, relative to the data's root or absolute; None leaves predictions.json away.
        confidence: N probabilities of every head; None spreads them over [0.5, 1].
        settings: of the provenance.
        gallery: write a gallery.png.
        seen: the seen classes; the run is then one of trzsl.
        changes: other keys of result.json.
    """
    folder = output / dataset / trainer / config / f"seed{seed}"
    folder.mkdir(parents=True)
    true = np.asarray(labels)
    heads = {}
    for head, classes in predicted.items():
        hit = np.asarray(classes) == true
        per_class = {classnames[c]: 100.0 * float(hit[true == c].mean()) for c in np.unique(true).tolist()}
        heads[head] = {"accuracy": 100.0 * float(hit.mean()), "macro_f1": 50.0, "per_class": per_class}
        if seen is not None:
            s, u = (100.0 * float(hit[np.isin(true, seen) == group].mean()) for group in (True, False))
            heads[head] |= {"seen": s, "unseen": u, "harmonic": 2 * s * u / (s + u) if s + u else 0.0}
    if images is not None:
        shares = np.linspace(0.5, 1, len(true)).tolist() if confidence is None else list(confidence)
        made = {head: {"predicted": list(classes), "confidence": shares} for head, classes in predicted.items()}
        predictions = {
            "format": 1,
            "split": "test",
            "root": str(output.parent / "data"),
            "images": list(images),
            "labels": list(labels),
            "classnames": list(classnames),
            "heads": made,
            **({} if seen is None else {"seen": list(seen)}),
        }
        (folder / "predictions.json").write_text(json.dumps(predictions))
    if gallery:
        Image.linear_gradient("L").save(folder / "gallery.png")
    result = {
        "format": 1,
        "trainer": trainer,
        "dataset": dataset,
        "config": config,
        "backbone": "mini",
        "split_family": "zhou",
        "template": "a photo of a {}.",
        "seed": seed,
        "heads": heads,
        "primary": "text",
        "pseudo_labels": {"selected": 0, "coverage": 0.0, "accuracy": None},
        "stages": [],
        "provenance": {"settings": dict(settings or {})},
        **({} if seen is None else {"paradigm": "trzsl"}),
        **changes,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def auxiliary_rounds(*weights: float, seed: int = 1, accuracy: float | None = 88.0) -> list[dict[str, Any]]:
    """`auxiliary` of a result: a round a lambda, the labels a point better each; EM with generated images."""
    return [
        {
            "changed": 13.0 - number,
            "lambda": weight,
            "scale": 0.09,
            "prior_strength": 10.0 + seed + number,
            "iterations": 17,
            "converged": True,
            "soft_counts": [10.5, 9.5],
            "accuracy": None if accuracy is None else accuracy + number,
        }
        for number, weight in enumerate(weights)
    ]


def stages(*entries: tuple[str, float | None]) -> list[dict[str, Any]]:
    """`stages` of a result, from names and seconds; None is one that came from the store."""
    return [
        {"name": name, "seconds": 0.05 if seconds is None else seconds, "cached": seconds is None}
        for name, seconds in entries
    ]


def guesses(labels: Sequence[int], classes: int, *, right: float, seed: int) -> list[int]:
    """Predictions of which about this share is right."""
    rng = np.random.default_rng(seed)
    true = np.asarray(labels)
    wrong = (true + rng.integers(1, max(classes, 2), len(true))) % classes
    return np.where(rng.random(len(true)) < right, true, wrong).tolist()


def write_several(output: Path, classnames: Sequence[str], *, dataset: str = "digits", images: int = 60) -> None:
    """Eight methods with two seeds each and everything that a page can show."""
    names = write_pictures(output.parent / "data", dataset, images)
    labels = [number % len(classnames) for number in range(images)]
    base = {"AIR.M": 60, "AIR.K": 16, "AIR.LAMBDA": 2.0}
    methods: list[tuple[str, str, float, dict[str, Any]]] = [
        ("ZeroshotCLIP", "mini", 0.5, {}),
        ("CoOp", "mini+DATASET.NUM_SHOTS=4", 0.7, {}),
        ("UPL", "mini", 0.55, {}),
        ("CPL", "mini", 0.6, {}),
        ("AiR", "mini+AIR.M=20", 0.6, {"AIR.M": 20, "AIR.K": 8}),
        ("AiR", "mini+AIR.LAMBDA=1", 0.65, {"AIR.LAMBDA": 1.0}),
        ("AiR", "mini+TRAINER.PROMPT.ROUNDS=3", 0.8, {"TRAINER.PROMPT.ROUNDS": 3}),
        ("AiR", "mini", 0.75, {}),
    ]
    for number, (trainer, config, right, settings) in enumerate(methods):
        for seed in (1, 2):
            predicted = {"text": guesses(labels, len(classnames), right=right, seed=10 * number + seed)}
            more: dict[str, Any] = {}
            if trainer in ("UPL", "CPL", "AiR"):
                rounds = [
                    {
                        "selected": 30 + 5 * r,
                        "coverage": 50.0 + r,
                        "accuracy": 90.0 - r + seed,
                        "candidates": 1.5,
                        "candidate_recall": 95.0,
                    }
                    for r in range(3 if "ROUNDS" in config else 1)
                ]
                more = {"pseudo_labels": rounds[-1], "rounds": rounds}
            if trainer == "AiR":
                predicted["fused"] = guesses(
                    labels, len(classnames), right=right + 0.05, seed=1000 + 10 * number + seed
                )
                used = {**base, **settings}["AIR.LAMBDA"]
                curve = {weight: 60.0 + weight + seed for weight in (0.0, 1.0, 2.0)}
                curve[used] = 100.0 * float((np.asarray(predicted["fused"]) == np.asarray(labels)).mean())
                more["by_lambda"] = [[weight, accuracy] for weight, accuracy in curve.items()]
                more["auxiliary"] = auxiliary_rounds(used, used, seed=seed)
                more["stages"] = stages(
                    ("backbone", 2.5),
                    ("features of train", None),
                    ("generator", 3.0),
                    ("lora", 100.0 + seed),
                    ("generation", 60.0),
                    ("lora, round 2", 90.0 + seed),
                    ("generation, round 2", 55.0),
                    ("features of test", 0.5),
                    ("prompt training", 20.5),
                )
            more["settings"] = {**base, "SEED": seed, **settings}
            write_run(
                output,
                classnames,
                labels,
                predicted,
                images=names,
                dataset=dataset,
                trainer=trainer,
                config=config,
                seed=seed,
                gallery=trainer == "AiR",
                **more,
            )
