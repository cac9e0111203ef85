"""Every name that clients import is there; what is left out says so; importing is cheap; registries."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest
from dassl_small import ROOT, standin_only, tiny_cfg

NAMES = {
    "dassl.config": "get_cfg_default clean_cfg",
    "dassl.data": "DatasetWrapper DataManager",
    "dassl.data.data_manager": "DatasetWrapper DataManager build_data_loader",
    "dassl.data.datasets": "DatasetBase DATASET_REGISTRY Datum build_dataset",
    "dassl.data.datasets.base_dataset": "Datum DatasetBase",
    "dassl.data.datasets.build": "DATASET_REGISTRY build_dataset",
    "dassl.data.samplers": "build_sampler",
    "dassl.data.transforms": "build_transform INTERPOLATION_MODES",
    "dassl.data.transforms.transforms": "build_transform INTERPOLATION_MODES",
    "dassl.engine": "TRAINER_REGISTRY build_trainer TrainerX TrainerXU TrainerBase SimpleTrainer",
    "dassl.engine.trainer": "TrainerX TrainerXU TrainerBase SimpleTrainer",
    "dassl.evaluation": "EVALUATOR_REGISTRY Classification EvaluatorBase build_evaluator",
    "dassl.evaluation.evaluator": "Classification EvaluatorBase",
    "dassl.metrics": "compute_accuracy",
    "dassl.optim": "build_optimizer build_lr_scheduler",
    "dassl.utils": (
        "mkdir_if_missing listdir_nohidden load_checkpoint load_pretrained_weights read_json write_json "
        "setup_logger set_random_seed collect_env_info check_isfile AverageMeter MetricMeter tolist_if_not "
        "count_num_param save_checkpoint resume_from_checkpoint Registry Logger check_availability read_image"
    ),
}


@pytest.mark.parametrize("module", NAMES)
def test_names_that_clients_import(module):
    loaded = importlib.import_module(module)
    missing = [name for name in NAMES[module].split() if not hasattr(loaded, name)]
    assert not missing


@standin_only
@pytest.mark.parametrize("module", NAMES)
def test_star_imports_work(module):
    namespace = {}
    exec(f"from {module} import *", namespace)
    assert set(getattr(importlib.import_module(module), "__all__", ())) <= set(namespace)


@standin_only
@pytest.mark.parametrize(
    ("statement", "missing"),
    [
        ("from dassl.utils import download_url", "dassl.utils.download_url"),
        ("from dassl.utils.torchtools import open_all_layers", "dassl.utils.torchtools.open_all_layers"),
        ("from dassl.engine import SimpleNet", "dassl.engine.SimpleNet"),
        ("from dassl.engine.trainer import SimpleNet", "dassl.engine.trainer.SimpleNet"),
        ("from dassl.engine.ssl import FixMatch", "dassl.engine.ssl"),
        ("import dassl.modeling.ops.utils", "dassl.modeling"),
        ("from dassl.modeling import build_backbone", "dassl.modeling"),
        ("from dassl.data.datasets import PACS", "dassl.data.datasets.PACS"),
        ("from dassl.data.samplers import RandomDomainSampler", "dassl.data.samplers.RandomDomainSampler"),
        ("from dassl.data.transforms.randaugment import RandAugment", "dassl.data.transforms.randaugment"),
        ("from dassl.metrics import cosine_distance", "dassl.metrics.cosine_distance"),
        ("from dassl.optim.lr_scheduler import LinearWarmupScheduler", "dassl.optim.lr_scheduler.Linear"),
    ],
)
def test_left_out_names_say_what_is_missing_and_where_to_get_it(statement, missing):
    with pytest.raises(ImportError, match=re.escape(missing) + ".*install Dassl.pytorch.*https://") as caught:
        exec(statement, {})
    assert "\n" not in str(caught.value)


@standin_only
def test_asking_whether_a_name_exists_still_works():
    import dassl.engine.trainer

    assert not hasattr(dassl, "no_such_name")
    assert not hasattr(dassl.engine, "no_such_name")
    assert not hasattr(dassl.engine.trainer, "no_such_name")


@standin_only
def test_import_is_cheap():
    """What only some runs need is imported when it is needed (upstream's import takes seconds)."""
    script = (
        f"import sys; sys.path.append({str(ROOT / 'compat')!r}); import torch; before = set(sys.modules); "
        "threads = torch.get_num_threads(); import dassl.engine, dassl.data, dassl.optim, dassl.metrics; "
        "assert threads == torch.get_num_threads(); "
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "dassl" in loaded
    assert not loaded & {"torchvision", "PIL", "sklearn", "scipy", "pandas", "tensorboard", "matplotlib"}


@standin_only
def test_data_sets_are_imported_without_torch():
    """Scripts ask every data set for its facts before a run begins; torch and NumPy would cost them seconds."""
    script = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; sys.path.append({str(ROOT / 'compat')!r})\n"
        "from importlib import import_module; from pathlib import Path\n"
        f"for path in Path({str(ROOT / 'datasets')!r}).glob('[a-z]*.py'): import_module(f'datasets.{{path.stem}}')\n"
        "from dassl.data.datasets import DATASET_REGISTRY\n"
        "print(len(DATASET_REGISTRY.registered_names()), *{'torch', 'numpy', 'PIL', 'sklearn'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    number, *heavy = result.stdout.split()
    assert int(number) >= 18 and not heavy


def test_version_says_which_dassl_this_is():
    import dassl

    assert dassl.__version__.startswith("0.6.3")


def test_registry():
    from dassl.utils import Registry

    registry = Registry("SHAPE")

    @registry.register()
    class Square:
        pass

    assert Square.__name__ == "Square", "the decorator returns the class"
    with pytest.raises(KeyError, match="Square"):
        registry.register(Square)
    registry.register(Square, force=True)

    def circle():
        pass

    registry.register(circle)
    assert registry.get("Square") is Square and registry.get("circle") is circle
    assert registry.registered_names() == ["Square", "circle"]
    with pytest.raises(KeyError, match="Triangle"):
        registry.get("Triangle")


@pytest.mark.parametrize(
    ("builder", "key", "available"),
    [
        ("dassl.engine.build_trainer", "TRAINER__NAME", "TinyTrainer"),
        ("dassl.data.datasets.build_dataset", "DATASET__NAME", "TinyColours"),
        ("dassl.evaluation.build_evaluator", "TEST__EVALUATOR", "Classification"),
    ],
)
def test_unknown_names_in_the_configuration_list_what_is_available(tmp_path, builder, key, available):
    module, function = builder.rsplit(".", 1)
    build = getattr(importlib.import_module(module), function)
    with pytest.raises(ValueError, match="NoSuchThing") as caught:
        build(tiny_cfg(tmp_path, tmp_path, **{key: "NoSuchThing"}))
    assert available in str(caught.value)
