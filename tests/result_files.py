"""Contents of result.json and predictions.json, whole and harmful, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def result(trainer: str = "AiR", seed: int = 1, accuracy: float = 80.0, **changes: Any) -> dict[str, Any]:
    heads = {"text": {"accuracy": accuracy}, "fused": {"accuracy": accuracy + 1}}
    return {
        "format": 1,
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
            "format": 1,
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


REQUIRED = ("seed", "heads", "primary", "pseudo_labels")
# As version 0.1 wrote it, without `format`.
OLD = {key: value for key, value in result().items() if key not in ("format", "primary")} | {"headline": "text"}


def _head(**metrics: Any) -> dict[str, Any]:
    return {"heads": {"text": {"accuracy": 80, **metrics}}}


def _round(**values: Any) -> dict[str, Any]:
    return {"auxiliary": [{"lambda": 2.0}, {"lambda": 2.0, **values}]}


def _stage(**values: Any) -> dict[str, Any]:
    return {"stages": [{"name": "lora", "seconds": 5.0, "cached": False, **values}]}


NAN, INFINITE = float("nan"), float("inf")
# What the message must say -> values of a result.json.
_WRONG_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("it has no such head", {"primary": "other"}),
    ("its primary is ['text']", {"primary": ["text"]}),
    ("its heads is [1]", {"heads": [1]}),
    ("it has no such head", {"heads": {}}),
    ("it has no heads.text.accuracy", {"heads": {"text": {}}}),
    ("its key of heads is 'a\\nb'", {"heads": {"text": {"accuracy": 80}, "a\nb": {"accuracy": 80}}}),
    ("its heads.text.accuracy is '80'; it must be a number", _head(accuracy="80")),
    ("its heads.text.accuracy is True", _head(accuracy=True)),
    ("its heads.text.accuracy is nan; it must be a number from 0 to 100", _head(accuracy=NAN)),
    ("its heads.text.accuracy is inf", _head(accuracy=INFINITE)),
    ("its heads.text.accuracy is -0.5", _head(accuracy=-0.5)),
    ("its heads.text.accuracy is 100.5", _head(accuracy=100.5)),
    ("its heads.text.accuracy is 1000", _head(accuracy=10**400)),  # no float is as large
    ("its heads.text.macro_f1 is 'high'", _head(macro_f1="high")),
    ("its heads.text.per_class.one is None", _head(per_class={"one": None})),
    ("its heads.text.per_class is [80]", _head(per_class=[80])),
    ("its heads.text.harmonic is 101", _head(accuracy=80, harmonic=101)),
    ("its heads.text.unseen is 'low'", _head(accuracy=80, unseen="low")),
    ("its paradigm is 'zsl'; it must be ul or ssl or trzsl", {"paradigm": "zsl"}),
    ("its pseudo_labels is 5", {"pseudo_labels": 5}),
    ("it has no pseudo_labels.accuracy", {"pseudo_labels": {"selected": 5}}),
    ("its pseudo_labels.selected is 'all'", {"pseudo_labels": {"accuracy": 80, "selected": "all"}}),
    ("its rounds is {", {"rounds": {"accuracy": 80}}),
    ("its rounds[0] is 80", {"rounds": [80]}),
    ("its by_lambda[0] is 1", {"by_lambda": [1, 2]}),
    ("its by_lambda[0] is [1]; it must be a list of 2 values", {"by_lambda": [[1]]}),
    ("its by_lambda[0][0] is nan", {"by_lambda": [[NAN, 80]]}),
    ("its by_lambda[0][1] is 101", {"by_lambda": [[2.0, 101]]}),
    ("its auxiliary is {", {"auxiliary": {"lambda": 2.0}}),
    ("its auxiliary is 'auto'", {"auxiliary": "auto"}),
    ("its auxiliary[0] is 2.0", {"auxiliary": [2.0]}),
    ("it has no auxiliary[0].lambda", {"auxiliary": [{"accuracy": 80}]}),
    ("its auxiliary[1].lambda is nan", _round(**{"lambda": NAN})),
    ("its auxiliary[1].lambda is -0.5", _round(**{"lambda": -0.5})),
    ("its auxiliary[1].lambda is 'auto'", _round(**{"lambda": "auto"})),
    ("its auxiliary[1].lambda is None", _round(**{"lambda": None})),
    ("its auxiliary[1].lambda is True", _round(**{"lambda": True})),
    ("its auxiliary[1].changed is -1.0", _round(changed=-1.0)),
    ("its auxiliary[1].changed is 100.5", _round(changed=100.5)),
    ("its auxiliary[1].changed is 'few'", _round(changed="few")),
    ("its auxiliary[1].accuracy is nan", _round(accuracy=NAN)),
    ("its auxiliary[1].accuracy is -0.1", _round(accuracy=-0.1)),
    ("its auxiliary[1].accuracy is 101", _round(accuracy=101)),
    ("its auxiliary[1].scale is inf", _round(scale=INFINITE)),
    ("its auxiliary[1].scale is '0.1'", _round(scale="0.1")),
    ("its auxiliary[1].prior_strength is nan", _round(prior_strength=NAN)),
    ("its auxiliary[1].prior_strength is -1", _round(prior_strength=-1)),
    ("its auxiliary[1].iterations is '17'", _round(iterations="17")),
    ("its auxiliary[1].converged is 'yes'; it must be true or false", _round(converged="yes")),
    ("its auxiliary[1].converged is 1", _round(converged=1)),
    ("its auxiliary[1].soft_counts is {", _round(soft_counts={"zero": 1})),
    ("its auxiliary[1].soft_counts[1] is '2'", _round(soft_counts=[1, "2"])),
    ("its auxiliary[1].soft_counts[0] is nan", _round(soft_counts=[NAN])),
    ("its auxiliary[1].soft_counts is 'all'", _round(soft_counts="all")),
    ("its beta is nan", {"beta": NAN}),
    ("its beta is 'auto'", {"beta": "auto"}),
    ("its beta is -1.0", {"beta": -1.0}),
    ("its stages is {", {"stages": {"lora": 5}}),
    ("its stages[0] is 5", {"stages": [5]}),
    ("its stages[0].name is None", _stage(name=None)),
    ("its stages[0].name is 'two\\nlines'; it must be one line of text", _stage(name="two\nlines")),
    ("its stages[0].seconds is nan", _stage(seconds=NAN)),
    ("its stages[0].seconds is -1.0", _stage(seconds=-1.0)),
    ("its stages[0].seconds is '5'", _stage(seconds="5")),
    ("its stages[0].seconds is 10000000000000.0", _stage(seconds=1e13)),
    ("its stages[0].cached is None", _stage(cached=None)),
    ("its stages[0].cached is 'no'", _stage(cached="no")),
    ("its provenance is 'here'", {"provenance": "here"}),
    ("its provenance.settings is [1]", {"provenance": {"settings": [1]}}),
    ("its class_names is 5", {"class_names": 5}),
    ("its format is 2; it must be 1", {"format": 2}),
    ("its seed is [1]; it must be a whole number", {"seed": [1]}),
    ("its seed is True", {"seed": True}),
    ("its seed is 1.5", {"seed": 1.5}),
    ("its dataset is 5; it must be text", {"dataset": 5}),
    ("its trainer is None", {"trainer": None}),
    ("its config is ['mini']", {"config": ["mini"]}),
    ("its template is 'a\\nphoto {}'", {"template": "a\nphoto {}"}),
    ("its backbone is '\\ud800'", {"backbone": "\ud800"}),  # half of a surrogate pair
    ("its config is '\\x1b[2J'", {"config": "\x1b[2J"}),  # clears a terminal
]
_WRONG_OLD_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("its primary is ['text']", {"headline": ["text"]}),
    ("its auxiliary[0].soft_counts is 'all'", {"auxiliary": [{"lambda": 2.0, "mass": "all"}]}),
    ("its auxiliary[0].prior_strength is nan", {"auxiliary": [{"lambda": 2.0, "anchor": NAN}]}),
    ("its auxiliary[0] is 2.0", {"auxiliary": [2.0]}),
    ("its provenance is 'here'", {"provenance": "here"}),
    ("its provenance.settings is [1]", {"provenance": {"settings": [1]}}),
    ("its class_names is 5", {"provenance": {"settings": {"DATASET.WORDING": 5, "AIR.SOURCE": [1]}}}),
]
# What the message must say, and the content of a result.json.
HARMFUL: list[tuple[str, str]] = [
    ("cannot be read: Unterminated string", json.dumps(result())[:50]),
    ("cannot be read: Expecting value", ""),
    ("it is 5; it must be a mapping", "5"),
    ("it is None", "null"),
    ("it is [1, 2]", "[1, 2]"),
    ("it is 'text'", '"text"'),
    ("nested too deeply", "[" * 100_000),
    ("it has no trainer", '{"accuracy": 5}'),
    *((f"it has no {key}", json.dumps({k: v for k, v in result().items() if k != key})) for key in REQUIRED),
    *((text, json.dumps({**result(), **changes})) for text, changes in _WRONG_VALUES),
    *((text, json.dumps({**OLD, **changes})) for text, changes in _WRONG_OLD_VALUES),
]
