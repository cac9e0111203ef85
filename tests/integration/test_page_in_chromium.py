"""The HTML page in a real browser: its pictures load, nothing is asked of anybody, nothing overflows."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from made_up_results import write_several

from air_plugin.report.collection import collect
from air_plugin.report.comparison import Comparison
from air_plugin.report.page import write_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
)
LISTEN = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message || event.target.tagName), true);
addEventListener("securitypolicyviolation", event => errors.push("blocked: " + event.blockedURI));
</script>"""
LOOK = """<script>
addEventListener("load", () => {
  const folded = document.querySelectorAll("details:not([open])").length;
  const closed = document.documentElement.scrollWidth;
  document.querySelectorAll("details").forEach(details => details.open = true);
  const outside = [...document.querySelectorAll("body *")].filter(element => !element.closest(".box > *, .hidden")
    && element.getBoundingClientRect().right > innerWidth + 0.5).map(element => element.tagName);
  const resources = performance.getEntriesByType("resource").map(entry => entry.name);
  parent.postMessage(JSON.stringify({
    errors, folded, outside, width: innerWidth, closed, open: document.documentElement.scrollWidth,
    images: document.images.length,
    broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt),
    requested: resources.filter(name => !name.startsWith("data:")),
  }), "*");
});
</script>"""
# A window is never narrower than 500 pixels, a frame is.
FRAME = """<!doctype html><title>frame</title><body><script>
addEventListener("message", event => {
  const verdict = document.createElement("pre");
  verdict.id = "verdict";
  verdict.textContent = event.data;
  document.body.append(verdict);
});
</script><iframe src="looked-at.html" style="border: 0; width: %dpx; height: 900px"></iframe></body>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    """The browser; without one the tests are skipped, or fail where AIR_NEEDS_CHROMIUM is set."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = f"no browser ({', '.join(NAMES)}) is installed"
        if os.environ.get("AIR_NEEDS_CHROMIUM"):
            pytest.fail(f"AIR_NEEDS_CHROMIUM is set, but {reason}")
        pytest.skip(reason)
    return found


def look_at(page: Path, chromium: str, *, width: int) -> dict[str, Any]:
    """What the browser says of a copy of the page that may run the scripts above; the rest of its policy stays."""
    text = page.read_text(encoding="utf-8")
    text = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    text = text.replace("<title>", f"{LISTEN}<title>", 1).replace("</body>", f"{LOOK}</body>")
    page.with_name("looked-at.html").write_text(text, encoding="utf-8")
    frame, profile = page.with_name("frame.html"), page.with_name(f"profile-{width}")
    frame.write_text(FRAME % width)
    shutil.rmtree(profile, ignore_errors=True)
    done = subprocess.run(
        [chromium, *QUIET, f"--user-data-dir={profile}", "--window-size=1400,1000", "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=180,
    )
    found = re.search(r'<pre id="verdict">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(unescape(found[1])), "console": console}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything: two data sets, long names, and more classes than a matrix takes in one of them."""
    output = tmp_path_factory.mktemp("page") / "output"
    long = [f"permanent crop land of the kind {name}" for name in ("nobody has ever seen", "Donaudampfschifffahrt" * 4)]
    write_several(output, [*long, *"abcdefghijklm"], dataset="fields")
    write_several(output, [f"flower number {number}" for number in range(60)], dataset="flowers")
    damaged = output / "fields" / "CPL" / "mini" / "seed2" / "predictions.json"
    damaged.write_text("{")
    collection = collect(output)
    (baseline,) = [method for method in collection.methods if method.title == "UPL"]
    return write_page(Comparison(collection, baseline), output / "report.html")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_whole_in_a_browser(chromium: str, page: Path, width: int):
    seen = look_at(page, chromium, width=width)
    assert seen["images"] > 100 and seen["broken"] == []
    assert seen["requested"] == [] and seen["errors"] == [] and seen["console"] == []
    assert seen["folded"] > 3 and seen["outside"] == []
    assert seen["width"] == width and seen["closed"] <= width and seen["open"] <= width


def test_a_page_that_is_not_whole_is_found(chromium: str, tmp_path: Path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!doctype html><title>bad</title><body><img alt="gone" src="http://127.0.0.1:9/gone.png">'
        '<div style="width: 2000px">wide</div>'
        '<script>console.error("said aloud"); undefined_name;</script></body>'
    )
    seen = look_at(bad, chromium, width=390)
    assert seen["broken"] == ["gone"] and len(seen["requested"]) == 1
    assert seen["open"] > 390 and "DIV" in seen["outside"]
    assert len(seen["errors"]) == 2 and any("said aloud" in line for line in seen["console"])
    bad.write_text(
        '<!doctype html><meta http-equiv="Content-Security-Policy" content="default-src \'none\';"><title>bad</title>'
        '<body><img alt="blocked" src="https://example.invalid/x.png"></body>'
    )
    assert any("blocked" in error for error in look_at(bad, chromium, width=390)["errors"])


def test_a_missing_browser_is_a_failure_where_one_is_needed(monkeypatch: pytest.MonkeyPatch):
    find = chromium.__wrapped__ if hasattr(chromium, "__wrapped__") else chromium.__pytest_wrapped__.obj
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("AIR_NEEDS_CHROMIUM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        find()
    monkeypatch.setenv("AIR_NEEDS_CHROMIUM", "1")
    with pytest.raises(pytest.fail.Exception, match="no browser"):
        find()
