"""Contents of result.json and predictions.json, whole and harmful, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def result(trainer: str = "AiR", seed: int = 1, accuracy: float = 80.0, **changes: Any) -> dict[str, Any]:
    heads = {"text": {"accuracy": accuracy}, "fused": {"accuracy": accuracy + 1}}
    return {
        "trainer": trainer,
        "dataset": "digits",
        "config": "mini",
        "backbone": "mini",
        "split_family": "zhou",
        "template": "a photo of the digit {}.",
        "seed": seed,
        "primary": "text",
        "heads": heads,
        "pseudo_labels": {"selected": 100, "coverage": 50.0, "accuracy": 90.0},
        **changes,
    }


def write(output: Path, values: Any, name: str | None = None) -> Path:
    if name is None:
        name = f"{values['dataset']}/{values['trainer']}/{values['config']}/seed{values['seed']}"
    path = output / name / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def write_run(output: Path, right: list[bool], **changes: Any) -> Path:
    """A result with the predictions it was made from: class 0 is the truth of every image, class 1 the mistake."""
    accuracy = 100.0 * sum(right) / len(right)
    path = write(output, result(heads={"text": {"accuracy": accuracy}}, **changes))
    write_predictions(
        path,
        {
            "split": "test",
            "root": "/data",
            "images": [f"images/{i}.png" for i in range(len(right))],
            "labels": [0] * len(right),
            "classnames": ["zero", "one"],
            "heads": {"text": {"predicted": [0 if hit else 1 for hit in right], "confidence": [0.75] * len(right)}},
        },
    )
    return path


def write_predictions(path: Path, values: Any) -> None:
    path.with_name("predictions.json").write_text(values if isinstance(values, str) else json.dumps(values))


def predictions_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name("predictions.json").read_text())


HARMFUL = {
    "cut short": json.dumps(result())[:50],
    "empty": "",
    "a number": "5",
    "null": "null",
    "a list": "[1, 2]",
    "text": '"text"',
    "nested": "[" * 100_000,
    "foreign": '{"accuracy": 5}',
    "without seed": json.dumps({key: value for key, value in result().items() if key != "seed"}),
    "without pseudo-labels": json.dumps({key: value for key, value in result().items() if key != "pseudo_labels"}),
    "without the primary classifier": json.dumps(result(primary="other")),
    "primary a list": json.dumps(result(primary=["text"])),
    "heads a list": json.dumps(result(heads=[1])),
    "no heads": json.dumps(result(heads={})),
    "head without accuracy": json.dumps(result(heads={"text": {}})),
    "accuracy no number": json.dumps(result(heads={"text": {"accuracy": "80"}})),
    "accuracy true": json.dumps(result(heads={"text": {"accuracy": True}})),
    "accuracy NaN": json.dumps(result(accuracy=float("nan"))),
    "accuracy infinite": json.dumps(result(accuracy=float("inf"))),
    "accuracy below 0": json.dumps(result(accuracy=-0.5)),
    "accuracy above 100": json.dumps(result(accuracy=100.5)),
    "accuracy too large for a float": json.dumps(result(accuracy=10**400)),
    "macro F1 no number": json.dumps(result(heads={"text": {"accuracy": 80, "macro_f1": "high"}})),
    "a class without number": json.dumps(result(heads={"text": {"accuracy": 80, "per_class": {"one": None}}})),
    "classes a list": json.dumps(result(heads={"text": {"accuracy": 80, "per_class": [80]}})),
    "pseudo-labels a number": json.dumps(result(pseudo_labels=5)),
    "pseudo-labels without accuracy": json.dumps(result(pseudo_labels={"selected": 5})),
    "selected no number": json.dumps(result(pseudo_labels={"accuracy": 80, "selected": "all"})),
    "rounds a mapping": json.dumps(result(rounds={"accuracy": 80})),
    "a round a number": json.dumps(result(rounds=[80])),
    "by_lambda without pairs": json.dumps(result(by_lambda=[1, 2])),
    "by_lambda NaN": json.dumps(result(by_lambda=[[float("nan"), 80]])),
    "auxiliary a mapping": json.dumps(result(auxiliary={"lambda": 2.0})),
    "auxiliary text": json.dumps(result(auxiliary="auto")),
    "a round of the auxiliary a number": json.dumps(result(auxiliary=[2.0])),
    "a round of the auxiliary without lambda": json.dumps(result(auxiliary=[{"accuracy": 80}])),
    **{
        f"auxiliary with {key} {value}": json.dumps(result(auxiliary=[{"lambda": 2.0}, {"lambda": 2.0, key: value}]))
        for key, value in (
            ("lambda", float("nan")),
            ("lambda", -0.5),
            ("lambda", "auto"),
            ("lambda", None),
            ("lambda", True),
            ("changed", -1.0),
            ("changed", 100.5),
            ("changed", "few"),
            ("accuracy", float("nan")),
            ("accuracy", -0.1),
            ("accuracy", 101),
            ("scale", float("inf")),
            ("scale", "0.1"),
            ("prior_strength", float("nan")),
            ("prior_strength", -1),
            ("iterations", "17"),
            ("converged", "yes"),
            ("converged", 1),
            ("soft_counts", {"zero": 1}),
            ("soft_counts", [1, "2"]),
            ("soft_counts", [float("nan")]),
            ("soft_counts", "all"),
        )
    },
    "beta NaN": json.dumps(result(beta=float("nan"))),
    "beta text": json.dumps(result(beta="auto")),
    "beta below 0": json.dumps(result(beta=-1.0)),
    "stages a mapping": json.dumps(result(stages={"lora": 5})),
    "a stage a number": json.dumps(result(stages=[5])),
    **{
        f"stage with {key} {value}": json.dumps(
            result(stages=[{"name": "lora", "seconds": 5.0, "cached": False, key: value}])
        )
        for key, value in (
            ("name", None),
            ("name", "two\nlines"),
            ("seconds", float("nan")),
            ("seconds", -1.0),
            ("seconds", "5"),
            ("seconds", 1e13),
            ("cached", None),
            ("cached", "no"),
        )
    },
    "provenance text": json.dumps(result(provenance="here")),
    "settings a list": json.dumps(result(provenance={"settings": [1]})),
    "wording a number": json.dumps(result(provenance={"settings": {"DATASET.WORDING": 5}})),
    "seed a list": json.dumps(result(seed=[1])),
    "seed true": json.dumps(result(seed=True)),
    "seed a fraction": json.dumps(result(seed=1.5)),
    "data set a number": json.dumps(result(dataset=5)),
    "trainer null": json.dumps(result(trainer=None)),
    "config a list": json.dumps(result(config=["mini"])),
    "template of two lines": json.dumps(result(template="a\nphoto {}")),
    "half a surrogate pair": json.dumps(result(backbone="\ud800")),
    "a terminal's escape": json.dumps(result(config="\x1b[2J")),
}
