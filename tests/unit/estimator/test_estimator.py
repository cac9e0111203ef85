"""The estimator: fitted, used, saved; and scikit-learn's conventions."""

from __future__ import annotations

import logging
import pickle
import warnings
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import SkipTest

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks
from small_models import make_backbone

from air_plugin import AiRClassifier, UserError, load_bundle
from air_plugin.auxiliary import build
from air_plugin.cli import main

# What check_estimator would run and this estimator does not pass: they all fit rows of numbers.
SKIPPED = "fits a 2-D array of features (n_samples, n_features); images are files or (N, H, W, 3) arrays"


def images(pictures: list[str]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path).convert("RGB").resize((16, 16))) for path in pictures])


# Fitting and using


def test_every_form_of_the_images_gives_the_same_classifier(parameters: dict[str, Any], pictures: list[str]):
    folder = Path(pictures[0]).parent
    fitted = AiRClassifier(**parameters).fit(folder)
    probs = fitted.predict_proba(folder)
    assert probs.shape == (len(pictures), 3) and np.allclose(probs.sum(axis=1), 1, atol=1e-5)
    assert fitted.classes_.tolist() == parameters["class_names"]
    assert fitted.predict(pictures).tolist() == [fitted.classes_[row.argmax()] for row in probs]
    assert np.array_equal(AiRClassifier(**parameters).fit(pictures).predict_proba(pictures), probs)
    opened = [Image.open(path) for path in pictures]
    in_memory = AiRClassifier(**parameters).fit(opened)
    assert np.allclose(in_memory.predict_proba(opened), probs, atol=1e-6)
    assert np.allclose(in_memory.predict_proba(pictures, head="text"), fitted.predict_proba(opened, head="text"))


def test_it_is_the_librarys_classifier(parameters: dict[str, Any], pictures: list[str]):
    """Slowly: p* = p + lambda p^ from the features of each image alone."""
    fitted = AiRClassifier(**parameters).fit(pictures)
    bundle, head = fitted.bundle_, fitted.auxiliary_.classifier
    for path, row in zip(pictures, fitted.predict_proba(pictures), strict=True):
        with torch.no_grad():
            feature = bundle.backbone.encode_images(bundle.backbone.preprocess(Image.open(path).convert("RGB"))[None])
            texts = bundle.backbone.encode_texts([f"a photo of a {name}." for name in fitted.classes_])
        text = (bundle.logit_scale * feature @ texts.T).softmax(dim=1)
        auxiliary = (head.scale * (feature @ head.weight.T + head.bias)).softmax(dim=1)
        fused = text + head.fusion_weight * auxiliary
        assert torch.allclose(torch.from_numpy(row), (fused / fused.sum())[0], atol=1e-5)


def test_a_repeated_fit_takes_everything_from_the_store(parameters: dict[str, Any], pictures: list[str], caplog):
    AiRClassifier(**parameters).fit(pictures)
    with caplog.at_level(logging.INFO):
        AiRClassifier(**parameters).fit(pictures)
    lines = [record.getMessage() for record in caplog.records]
    assert sum("(from the store)" in line for line in lines if line.startswith("stage ")) == 3


@pytest.mark.parametrize("stage", ["generate_images", "make_prototypes", "finalize"])
def test_an_interrupted_fit_goes_on_with_the_same_result(
    stage: str, parameters: dict[str, Any], pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = AiRClassifier(**{**parameters, "cache": tmp_path / "undisturbed"}).fit(pictures).predict_proba(pictures)
    estimator = AiRClassifier(**parameters)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build, stage, interrupt)
        estimator.fit(pictures)
    with pytest.raises(NotFittedError):
        estimator.predict(pictures)
    trained = [path for path in (parameters["cache"] / "lora").rglob("*") if path.is_file()]
    times = {path: path.stat().st_mtime_ns for path in trained}
    assert np.array_equal(estimator.fit(pictures).predict_proba(pictures), whole)
    assert trained and {path: path.stat().st_mtime_ns for path in trained} == times  # LoRA was not trained again


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_the_seed_decides_the_images_and_global_random_numbers_stay(parameters: dict[str, Any], pictures: list[str]):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made = [AiRClassifier(**parameters, random_state=seed).fit(pictures).auxiliary_ for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    one, same, other = (auxiliary.prototypes.generated for auxiliary in made)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_broken_files_are_left_out_and_named(
    parameters: dict[str, Any], pictures: list[str], caplog: pytest.LogCaptureFixture
):
    folder = Path(pictures[0]).parent
    broken = [folder / "z1.png", folder / "z2.jpg"]
    for path in broken:
        path.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    fitted = AiRClassifier(**parameters).fit(folder)
    assert list(fitted.skipped_) == broken
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 2 and all(str(path) in line for path, line in zip(broken, lines, strict=True))
    assert np.array_equal(
        fitted.predict_proba(pictures), AiRClassifier(**parameters).fit(pictures).predict_proba(pictures)
    )
    with pytest.raises(UserError, match=r"z1\.png.*z2\.jpg.*a row for each image"):
        fitted.predict(folder)


def test_score_takes_names_and_places(parameters: dict[str, Any], pictures: list[str]):
    fitted = AiRClassifier(**parameters).fit(pictures)
    labels = fitted.predict(pictures)
    assert fitted.score(pictures, labels) == 1.0
    places = [fitted.classes_.tolist().index(name) for name in labels]
    places[0] = (places[0] + 1) % 3
    assert fitted.score(pictures, places) == pytest.approx(1 - 1 / len(pictures))
    with pytest.raises(UserError, match=r"labels lie in \[0, 3\]"):
        fitted.score(pictures[:2], [0, 3])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "one class": ({"class_names": ["dog"]}, "at least 2 classes"),
    "one name twice": ({"class_names": ["dog", "Dog"]}, "one name to a text tower"),
    "a long name": ({"class_names": ["dog", "very " * 90 + "long"]}, "longer than the 77 tokens of tiny"),
    "no template": ({"template": "a photo"}, "template is 'a photo'"),
    "no head": ({"head": "best"}, "head is 'best'"),
    "no setting": ({"settings": {"AIR.LAMDA": 1}}, "did you mean AIR.LAMBDA"),
    "no device": ({"device": "gpu"}, "device 'gpu' cannot be used"),
    "no seed": ({"random_state": -1}, "random_state is -1; it must be in [0, "),
    "no number": ({"random_state": None}, "random_state is None"),
    "no cache": ({"cache": "/dev/null/x"}, "cannot write /dev/null/x"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_parameters_are_one_line(kind: str, parameters: dict[str, Any], pictures: list[str]):
    changed, said = BAD[kind]
    with pytest.raises(UserError) as raised:
        AiRClassifier(**{**parameters, **changed}).fit(pictures)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_bad_images_are_one_line(parameters: dict[str, Any], pictures: list[str], tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_text("no image")
    broken = [tmp_path / "broken.png"]
    for images_, said in (
        (tmp_path / "empty", "no images below"),
        (pictures[:1], "there is 1 image; a classifier is fitted on at least 2"),
        (broken * 2, "0 of the 2 images can be read"),
        ([*broken, pictures[0]], "1 of the 2 images can be read"),
    ):
        with pytest.raises(UserError, match=said):
            AiRClassifier(**parameters).fit(images_)


# Folders


def test_a_saved_classifier_predicts_the_same(parameters: dict[str, Any], pictures: list[str], tmp_path: Path):
    fitted = AiRClassifier(**parameters, head="text").fit(pictures)
    fitted.save(tmp_path / "saved")
    loaded = AiRClassifier.load(tmp_path / "saved", backbone=make_backbone())
    for head in ("text", "fused", None):
        assert np.array_equal(loaded.predict_proba(pictures, head=head), fitted.predict_proba(pictures, head=head))
    kept = {key: value for key, value in fitted.get_params().items() if key != "cache"}
    assert {key: value for key, value in loaded.get_params().items() if key != "cache"} == kept
    rows = load_bundle(tmp_path / "saved", backbone=make_backbone()).predict(pictures)
    assert [row.label for row in rows] == fitted.predict(pictures).tolist()
    loaded.save(tmp_path / "again")
    again = AiRClassifier.load(tmp_path / "again", backbone=make_backbone())
    assert np.array_equal(again.predict_proba(pictures), fitted.predict_proba(pictures))


def test_examples_are_kept_with_a_saved_classifier(parameters: dict[str, Any], pictures: list[str], tmp_path: Path):
    fitted = AiRClassifier(**parameters).fit(pictures)
    fitted.save(tmp_path / "saved")
    fitted.save(tmp_path / "saved")  # over the first
    made, found = fitted.examples_, AiRClassifier.load(tmp_path / "saved", backbone=make_backbone()).examples_
    assert made and found and [len(row) for row in found.generated] == [2, 2, 2]
    for one, other in zip(chain(*made.generated), chain(*found.generated), strict=True):
        assert other.is_relative_to(tmp_path / "saved")
        assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(other)))
    probs = fitted.predict_proba(pictures)
    order = np.argsort(probs.max(axis=1), kind="stable")
    assert [one.path for one in made.unsure] == [Path(pictures[i]) for i in order]
    assert [one.label for one in found.unsure] == fitted.predict([pictures[i] for i in order]).tolist()
    assert [one.probability for one in found.unsure] == pytest.approx(sorted(probs.max(axis=1)), abs=1e-6)
    loaded = AiRClassifier.load(tmp_path / "saved", backbone=make_backbone())
    loaded.save(tmp_path / "saved")  # over the pictures that it reads
    assert all(path.is_file() for path in chain(*found.generated))
    (tmp_path / "mine" / "examples").mkdir(parents=True)
    (tmp_path / "mine" / "examples" / "letter.txt").write_text("of somebody")
    with pytest.raises(UserError, match="examples is there and not of a classifier"):
        fitted.save(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").rglob("*.*")] == ["letter.txt"]
    large = replace(made, unsure=[replace(made.unsure[0], path=tmp_path / "large.png")])
    Image.new("RGB", (400, 300)).save(tmp_path / "large.png")
    large.save(tmp_path / "large")
    with Image.open(tmp_path / "large" / "examples" / "unsure" / "00.png") as small:
        assert small.size == (128, 96)
    prototypes = fitted.auxiliary_.prototypes.features
    assert found.nearest(prototypes[1, 1], 1, 2) == found.generated[1][::-1]


def test_another_backbone_is_refused(parameters: dict[str, Any], pictures: list[str], tmp_path: Path):
    AiRClassifier(**parameters).fit(pictures).save(tmp_path / "saved")
    with pytest.raises(UserError, match="was made by other weights") as raised:
        AiRClassifier.load(tmp_path / "saved", backbone=make_backbone(seed=1))
    assert "\n" not in str(raised.value)


# The command


def test_fit_then_predict_on_the_command_line(
    parameters: dict[str, Any], pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
):
    folder = Path(pictures[0]).parent
    (folder / "broken.png").write_text("no image")
    options = [word for key, value in parameters["settings"].items() for word in (key, str(value))]
    words = ["--backbone", "mini", "--generator", "mini", "--cache", str(tmp_path / "cache"), *options]
    out, table = tmp_path / "made" / "classifier", tmp_path / "labels.csv"
    (tmp_path / "names.txt").write_text("dog\ncat\nsea lion\ntemplate: a drawing of a {}.\n")
    for classes in (["dog", "cat", "sea lion"], [str(tmp_path / "names.txt")]):
        command = ["fit", str(folder), "--classes", *classes, "--out", str(out), "--predict", str(table)]
        assert main([*command, *words]) == 0
        text, err = capsys.readouterr()
        assert f"classifier: {out} (3 classes, from {len(pictures)} images; 1 files could not be read)\n" in text
        assert err.count("it is left out") == 1 and f"wrote {table}\n" in text
        assert main(["predict", str(out), str(folder)]) == 0
        rows, err = capsys.readouterr()
        assert err.count("it is left out") == 1
        assert [row.split(",")[:2] for row in table.read_text().splitlines()[1:]] == [
            row.split("\t")[:2] for row in rows.splitlines()
        ]
    assert AiRClassifier.load(out, backbone=make_backbone()).template == "a drawing of a {}."


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--classes", "dog"], "holds 1 names"),
        (["--classes", "nowhere.txt"], "nowhere.txt"),
        (["--classes", "dog", "cat", "DOG"], "one name"),
        (["--classes", "dog", "cat", "--seed", "1", "AIR.M"], "'AIR.M' has no partner"),
        (["--classes", "dog", "cat", "--template", "photo"], "template is 'photo'"),
        (["--classes", "dog", "cat", "--out", "/dev/null"], "cannot write /dev/null"),
        (["--classes", "dog", "cat", "--out", "{images}/made"], "its pictures would be taken for images"),
    ],
)
def test_a_bad_command_is_one_line(
    words: list[str], said: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    folder = str(Path(pictures[0]).parent)
    words = [word.format(images=folder) for word in words]
    assert main(["fit", folder, "--out", str(tmp_path / "out"), *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and said in err


# scikit-learn's conventions


def test_parameters_are_stored_as_they_are_given(parameters: dict[str, Any]):
    estimator = AiRClassifier(**parameters)
    assert vars(estimator) == estimator.get_params() and estimator.class_names is parameters["class_names"]
    copy = clone(estimator.set_params(head="text"))
    assert copy.get_params() == {**estimator.get_params(), "head": "text"} and copy is not estimator
    assert is_classifier(estimator) and "head='text'" in repr(estimator)
    with pytest.raises(ValueError, match="heads"):
        estimator.set_params(heads="text")
    with pytest.raises(NotFittedError):
        estimator.predict(["x.png"])
    assert pickle.loads(pickle.dumps(estimator)).get_params() == estimator.get_params()


def test_it_works_within_scikit_learn(parameters: dict[str, Any], pictures: list[str]):
    arrays = images(pictures)
    labels = np.array(parameters["class_names"])[np.arange(len(arrays)) % 3]
    assert cross_val_score(AiRClassifier(**parameters), arrays, labels, cv=2).shape == (2,)
    search = GridSearchCV(AiRClassifier(**parameters), {"head": ["text", "fused"]}, cv=2).fit(list(arrays), labels)
    assert search.best_params_["head"] in ("text", "fused") and len(search.predict(arrays)) == len(arrays)
    assert make_pipeline(AiRClassifier(**parameters)).fit(pictures).predict_proba(pictures).shape[1] == 3


class Claims2D(AiRClassifier):
    """The same, with the tag that makes scikit-learn run all of its checks."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


def error_of(check: Any, estimator: AiRClassifier) -> Exception | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(estimator)
    except SkipTest:  # by scikit-learn itself, for want of a package
        return None
    except Exception as error:
        return error
    return None


def refuses_2d(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, is the estimator's about a 2-D array."""
    while error is not None and "it must be (N, H, W, 3) or (N, H, W)" not in str(error):
        error = error.__cause__ or error.__context__
    return error is not None


def checks(estimator: AiRClassifier) -> list[Any]:
    return [check for _, check in estimator_checks.estimator_checks_generator(estimator, mark=None)]


def test_scikit_learns_own_checks_pass(parameters: dict[str, Any]):
    """All that check_estimator runs for an estimator that takes no 2-D array."""
    with warnings.catch_warnings(record=True):
        found = checks(AiRClassifier(**parameters))
    for check in found:
        check(AiRClassifier(**parameters))
    assert found


def test_the_checks_that_are_skipped_are_those_of_rows_of_features(parameters: dict[str, Any]):
    """Of all checks for classifiers, the ones that fail do so at their 2-D array: SKIPPED."""
    estimator = Claims2D(**parameters)
    passed, skipped = set(), set()
    for check in checks(estimator):
        name = getattr(check, "func", check).__name__
        found = error_of(check, estimator)
        (skipped if found else passed).add(name)
        assert not found or refuses_2d(found), f"{name} fails for another reason than: {SKIPPED}\n{found!r}"
    needed = {"check_no_attributes_set_in_init", "check_get_params_invariance", "check_estimator_cloneable"}
    assert needed <= passed and "check_classifiers_train" in skipped
