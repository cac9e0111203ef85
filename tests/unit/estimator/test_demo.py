"""The page of `air demo`: what it shows, in a real browser, and that it asks nobody else.

It needs the extra `demo`, playwright and a browser; without one the tests are skipped, or fail where AIR_NEEDS_DEMO is
set.
"""

from __future__ import annotations

import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import make_backbone

from air_plugin import AiRClassifier, load_bundle
from air_plugin.cli import main
from air_plugin.demo import Explainer, serve
from air_plugin.estimator.examples import Examples

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def fitted(parameters: dict[str, Any], pictures: list[str], tmp_path: Path) -> AiRClassifier:
    made = AiRClassifier(**parameters).fit(pictures)
    made.save(tmp_path / "classifier")
    return made


def test_the_heads_are_those_of_the_classifier(fitted: AiRClassifier, pictures: list[str], tmp_path: Path):
    folder = tmp_path / "classifier"
    explainer = Explainer(load_bundle(folder, backbone=make_backbone()), Examples.load(folder))
    for path in pictures:
        found = explainer.probabilities(explainer.features(path))
        assert list(found) == ["text", "auxiliary", "fused"]
        for head in ("text", "fused"):
            expected = fitted.predict_proba([path], head=head)[0]
            assert list(found[head].values()) == pytest.approx(expected, abs=1e-6)
        text, auxiliary, fused = (np.array([*found[head].values()]) for head in found)
        weight = fitted.auxiliary_.classifier.fusion_weight
        assert auxiliary.sum() == pytest.approx(1) and fused == pytest.approx(
            (text + weight * auxiliary) / (1 + weight), abs=1e-6
        )


def test_the_images_are_the_nearest_of_the_winning_classes(fitted: AiRClassifier, pictures: list[str]):
    """Slowly: every cosine of an image to every kept generated image."""
    explainer = Explainer(fitted.bundle_, fitted.examples_)
    feature = explainer.features(pictures[0])
    near = explainer.nearest(feature)
    prototypes = fitted.auxiliary_.prototypes
    order = fitted.classes_[np.argsort(-fitted.predict_proba([pictures[0]])[0], kind="stable")]
    assert near[0][1] == order[0] and {name for _, name in near} == {*fitted.classes_}
    for name in fitted.classes_:
        label = fitted.classes_.tolist().index(name)
        cosine = {
            prototypes.images[label][kept]: float(torch.dot(feature, prototypes.generated[label, kept]))
            for kept in prototypes.kept[label].tolist()
        }
        assert [path for path, of in near if of == name] == sorted(cosine, key=cosine.__getitem__, reverse=True)


def test_a_bundle_without_pictures_is_explained_too(fitted: AiRClassifier, pictures: list[str], tmp_path: Path):
    shutil.rmtree(tmp_path / "classifier" / "examples")
    bundle = load_bundle(tmp_path / "classifier", backbone=make_backbone())
    explainer = Explainer(bundle, Examples.load(tmp_path / "classifier"))
    assert explainer.examples is None and explainer.nearest(explainer.features(pictures[0])) == []


def test_without_the_extra_the_command_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("air_plugin.utils.extras.find_spec", lambda name: None)
    assert main(["demo", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: air demo needs packages that are not installed; run: pip install")


# In a browser


@pytest.fixture
def page(fitted: AiRClassifier, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """The page's address and a browser's tab that shows it."""
    lacks = [name for name in ("gradio", "playwright") if find_spec(name) is None] + ["a browser"] * (BROWSER is None)
    if lacks:
        missing = f"not installed: {', '.join(lacks)}"
        pytest.fail(missing) if os.environ.get("AIR_NEEDS_DEMO") else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    served = serve(tmp_path / "classifier")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
            yield served.address, browser.new_page(viewport={"width": 1280, "height": 1000})
            browser.close()
    finally:
        served.close()


def test_the_page_in_a_browser(page: tuple[str, Any], fitted: AiRClassifier, pictures: list[str], tmp_path: Path):
    address, tab = page
    asked: list[str] = []
    faults: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.goto(address)
    tab.wait_for_selector("#unsure img", timeout=60_000)
    assert tab.locator("#unsure img").count() == len(pictures)
    for path in pictures[:2]:
        tab.set_input_files("input[type=file]", path)
        for head in ("text", "fused"):
            probs = fitted.predict_proba([path], head=head)[0]
            best = f"{fitted.classes_[probs.argmax()]}\n{100 * probs.max():.0f}%"
            tab.wait_for_function(
                "([id, text]) => document.getElementById(id).innerText.includes(text)", arg=[head, best], timeout=60_000
            )
        assert "%" in tab.inner_text("#auxiliary")
        tab.wait_for_selector("#nearest img")
        assert tab.locator("#nearest img").count() == 6 and tab.inner_text("#nearest").count("sea lion") == 2
        tab.get_by_label("Remove Image").or_(tab.get_by_label("Clear")).first.click()
    assert asked and not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not faults
    (tmp_path / "broken.png").write_bytes(Path(pictures[0]).read_bytes()[:60])
    tab.set_input_files("input[type=file]", str(tmp_path / "broken.png"))
    tab.get_by_text("no whole image").first.wait_for(timeout=60_000)


def test_the_page_is_served_on_loopback_alone_and_forbids_other_hosts(page: tuple[str, Any]):
    address, tab = page
    assert address.startswith("http://127.0.0.1:")
    policy = tab.goto(address).headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy
    config = tab.evaluate("() => fetch('/config').then(answer => answer.json())")
    assert config["analytics_enabled"] is False and not config.get("share_url")
    port = address.rstrip("/").rpartition(":")[2]
    import socket

    here = socket.gethostbyname(socket.gethostname())
    if here != "127.0.0.1":
        with pytest.raises((urllib.error.URLError, OSError)):
            urllib.request.urlopen(f"http://{here}:{port}", timeout=3)


def test_a_port_in_use_is_one_line(page: tuple[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture):
    port = page[0].rstrip("/").rpartition(":")[2]
    assert main(["demo", str(tmp_path / "classifier"), "--port", port]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the page cannot be served: ") and err.count("\n") == 1 and "--port" in err
