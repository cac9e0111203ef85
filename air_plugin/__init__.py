"""AiR: an auxiliary classifier of generated images for unsupervised prompt learning (arXiv 2504.11930).

The names below are imported on first use, so that `import air_plugin` and `air --help` stay quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AiRClassifier": "estimator.classifier",
    "AirSettings": "settings",
    "Auxiliary": "auxiliary.build",
    "AuxiliaryClassifier": "auxiliary.classifier",
    "AuxiliaryMixin": "mixin",
    "Backbone": "clip.backbone",
    "Bundle": "inference.predict",
    "FeatureTable": "clip.features",
    "ImagesOnDisk": "clip.images_on_disk",
    "Prediction": "inference.predict",
    "PromptLearner": "clip.prompts",
    "Predictions": "report.predictions",
    "RunResult": "report.record",
    "Stages": "utils.provenance",
    "Store": "utils.store",
    "Team": "engine",
    "TextEncoder": "clip.text_encoder",
    "UnlabelledImages": "clip.zero_shot",
    "UserError": "utils.errors",
    "add_air_config": "config",
    "augment": "mixin",
    "build_auxiliary": "auxiliary.build",
    "candidate_sets": "functional.pseudo_labels",
    "export_onnx": "inference.onnx",
    "extract_features": "clip.features",
    "finalize_shards": "auxiliary.shards",
    "fuse": "functional.fusion",
    "load_backbone": "clip.loading",
    "load_bundle": "inference.bundle",
    "look_at_unlabelled": "clip.zero_shot",
    "merge_file": "config",
    "read_class_file": "utils.class_names",
    "save_bundle": "inference.bundle",
    "select_prototypes": "functional.prototypes",
    "show_logs": "utils.logs",
    "template_features": "clip.zero_shot",
    "top_k_per_class": "functional.pseudo_labels",
}
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
