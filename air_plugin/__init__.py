"""AiR: an auxiliary classifier of generated images for unsupervised prompt learning (arXiv 2504.11930).

The names below are imported on first use, so that `import air_plugin` and `air --help` stay quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AuxiliaryClassifier": "classifier",
    "AuxiliaryMixin": "mixin",
    "Backbone": "backbone",
    "Bundle": "bundle",
    "FeatureTable": "features",
    "PromptEncoder": "prompts",
    "PromptLearner": "prompts",
    "Store": "store",
    "UserError": "errors",
    "add_air_config": "config",
    "augment": "mixin",
    "build_auxiliary": "auxiliary",
    "candidate_sets": "pseudo_labels",
    "export_onnx": "export",
    "extract_features": "features",
    "fuse": "pseudo_labels",
    "load_backbone": "backbone",
    "load_bundle": "bundle",
    "save_bundle": "bundle",
    "select_prototypes": "prototypes",
    "top_k_per_class": "pseudo_labels",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
