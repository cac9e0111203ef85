"""A page on this machine's loopback where one drops an image and sees what a classifier makes of it, and why.

Nothing leaves the machine: it is not shared, Gradio's analytics are off, and the browser may ask no other host.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from air_plugin.estimator.examples import Examples
from air_plugin.inference.bundle import load_bundle
from air_plugin.inference.predict import Bundle
from air_plugin.utils.devices import pick_device
from air_plugin.utils.errors import UserError, first_line
from air_plugin.utils.extras import require_extra
from air_plugin.utils.images import UnreadableImage, load_rgb

if TYPE_CHECKING:
    from torch import Tensor

LOOPBACK = "127.0.0.1"
SHOWN, NEAREST, CLASSES = 5, 4, 3  # classes with a bar, images of a class, classes with images
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'"
)
TITLES = {"text": "text: CLIP's own classifier", "auxiliary": "auxiliary: generated images", "fused": "fused"}


class Explainer:
    """A classifier with its pictures, and what it makes of one image."""

    def __init__(self, bundle: Bundle, examples: Examples | None) -> None:
        self.bundle, self.examples = bundle, examples

    @property
    def heads(self) -> list[str]:
        """The names of the classifiers that are shown: text and, with an auxiliary classifier, two more."""
        return ["text"] if self.bundle.auxiliary is None else ["text", "auxiliary", "fused"]

    @torch.no_grad()
    def features(self, path: str | Path) -> Tensor:
        """(D,) unit features of an image file.

        Raises:
            UnreadableImage: it is no whole image.
        """
        backbone = self.bundle.backbone
        return backbone.encode_images(backbone.preprocess(load_rgb(path))[None])[0]

    def probabilities(self, features: Tensor) -> dict[str, dict[str, float]]:
        """The probability of each class by head, from (D,) unit features; each head's sum to 1."""
        probs = self.bundle.classify(features[None])
        if self.bundle.auxiliary is not None:
            auxiliary = self.bundle.auxiliary.probs(features[None])
            probs["auxiliary"] = auxiliary / auxiliary.sum(dim=1, keepdim=True)
        names = self.bundle.classnames
        return {head: dict(zip(names, probs[head][0].tolist(), strict=True)) for head in self.heads}

    def nearest(self, features: Tensor) -> list[tuple[Path, str]]:
        """Generated images that are nearest to an image, with their class: of the classes that a head ranks first,
        then of the next ones of the head that predicts, up to three.
        """
        if self.examples is None:
            return []
        ranked = {
            head: sorted(values, key=values.__getitem__, reverse=True)
            for head, values in self.probabilities(features).items()
        }
        primary = ranked[self.bundle.primary]
        classes = list(dict.fromkeys([primary[0], *(names[0] for names in ranked.values()), *primary]))[:CLASSES]
        places = {name: place for place, name in enumerate(self.bundle.classnames)}
        return [(path, name) for name in classes for path in self.examples.nearest(features, places[name], NEAREST)]


def build_page(explainer: Explainer) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio

    def explain(path: str | None) -> list[Any]:
        if not path:
            return [None] * (len(explainer.heads) + 1)
        try:
            features = explainer.features(path)
        except UnreadableImage as error:
            raise gradio.Error(f"this file is no whole image: {error}", print_exception=False) from error
        near = [(load_rgb(file), name) for file, name in explainer.nearest(features)]
        return [*explainer.probabilities(features).values(), near]

    count = min(SHOWN, len(explainer.bundle.classnames))
    with gradio.Blocks(title="AiR", analytics_enabled=False) as page:
        gradio.Markdown(f"# AiR\n{len(explainer.bundle.classnames)} classes. Drop an image; it stays on this machine.")
        with gradio.Row():
            image = gradio.Image(
                type="filepath", image_mode=None, sources=["upload", "clipboard"], label="your image", elem_id="image"
            )
            labels = [gradio.Label(num_top_classes=count, label=TITLES[head], elem_id=head) for head in explainer.heads]
        near = gradio.Gallery(
            label="nearest generated images of the classes that win",
            columns=NEAREST * CLASSES,
            elem_id="nearest",
            format="png",
            interactive=False,
        )
        if explainer.examples is not None and explainer.examples.unsure:
            shown = [(load_rgb(one.path), f"{one.label} {one.probability:.2f}") for one in explainer.examples.unsure]
            gradio.Gallery(
                shown,
                label="unlabelled images with the least sure label",
                columns=8,
                elem_id="unsure",
                format="png",
                interactive=False,
            )
        image.change(explain, image, [*labels, near], show_progress="hidden")
    return page


@dataclass(frozen=True)
class Served:
    """A page that a thread of this process serves at an address."""

    address: str
    page: Any

    def wait(self) -> None:
        """Return only after Ctrl-C or `close`."""
        self.page.block_thread()

    def close(self) -> None:
        """End the page."""
        self.page.close(verbose=False)


def serve(folder: str | Path, *, port: int | None = None, device: str = "", backbone: str | None = None) -> Served:
    """Show a classifier's page on the loopback address.

    Args:
        folder: that `AiRClassifier.save`, `air fit` or a run of train.py wrote.
        port: of the page; None is the first free one from 7860 on.
        device: see `pick_device`.
        backbone: where its weights lie now, if they were moved.

    Raises:
        UserError: Gradio is not installed, the folder holds no whole classifier, or one with learned tokens in its
            image tower, or the port is in use.
    """
    require_extra("demo", purpose="air demo")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import gradio
    from starlette.middleware import Middleware

    bundle = load_bundle(folder, device=pick_device(device), backbone=backbone)
    bundle.require_frozen_tower("air demo")
    page = build_page(Explainer(bundle, Examples.load(Path(folder))))
    try:
        _, address, _ = page.launch(
            server_name=LOOPBACK,
            server_port=port,
            share=False,
            quiet=True,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            app_kwargs={"middleware": [Middleware(_Policy)]},
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"the page cannot be served: {first_line(error)} Choose another --port") from error
    return Served(address, page)


class _Policy:
    """Adds to every answer that the browser may ask no other host."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)
