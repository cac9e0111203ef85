"""Configuration keys that CoOp-family code and its YAML files read or set."""

from __future__ import annotations

import pytest
from dassl_small import tiny_cfg
from yacs.config import CfgNode

DEFAULTS = {
    "VERSION": 1,
    "OUTPUT_DIR": "./output",
    "RESUME": "",
    "SEED": -1,
    "USE_CUDA": True,
    "VERBOSE": True,
    "INPUT.SIZE": (224, 224),
    "INPUT.INTERPOLATION": "bilinear",
    "INPUT.TRANSFORMS": (),
    "INPUT.NO_TRANSFORM": False,
    "INPUT.PIXEL_MEAN": [0.485, 0.456, 0.406],
    "INPUT.PIXEL_STD": [0.229, 0.224, 0.225],
    "INPUT.CROP_PADDING": 4,
    "INPUT.RRCROP_SCALE": (0.08, 1.0),
    "INPUT.COLORJITTER_B": 0.4,
    "INPUT.COLORJITTER_H": 0.1,
    "INPUT.RGS_P": 0.2,
    "INPUT.GB_P": 0.5,
    "INPUT.GB_K": 21,
    "DATASET.ROOT": "",
    "DATASET.NAME": "",
    "DATASET.SOURCE_DOMAINS": (),
    "DATASET.TARGET_DOMAINS": (),
    "DATASET.NUM_LABELED": -1,
    "DATASET.NUM_SHOTS": -1,
    "DATASET.VAL_PERCENT": 0.1,
    "DATASET.ALL_AS_UNLABELED": False,
    "DATALOADER.NUM_WORKERS": 4,
    "DATALOADER.K_TRANSFORMS": 1,
    "DATALOADER.RETURN_IMG0": False,
    "DATALOADER.TRAIN_X.SAMPLER": "RandomSampler",
    "DATALOADER.TRAIN_X.BATCH_SIZE": 32,
    "DATALOADER.TRAIN_X.N_DOMAIN": 0,
    "DATALOADER.TRAIN_X.N_INS": 16,
    "DATALOADER.TRAIN_U.SAME_AS_X": True,
    "DATALOADER.TRAIN_U.SAMPLER": "RandomSampler",
    "DATALOADER.TRAIN_U.BATCH_SIZE": 32,
    "DATALOADER.TEST.SAMPLER": "SequentialSampler",
    "DATALOADER.TEST.BATCH_SIZE": 32,
    "MODEL.INIT_WEIGHTS": "",
    "MODEL.BACKBONE.NAME": "",
    "MODEL.BACKBONE.PRETRAINED": True,
    "MODEL.HEAD.NAME": "",
    "MODEL.HEAD.HIDDEN_LAYERS": (),
    "OPTIM.NAME": "adam",
    "OPTIM.LR": 0.0003,
    "OPTIM.WEIGHT_DECAY": 5e-4,
    "OPTIM.MOMENTUM": 0.9,
    "OPTIM.SGD_DAMPNING": 0,
    "OPTIM.SGD_NESTEROV": False,
    "OPTIM.RMSPROP_ALPHA": 0.99,
    "OPTIM.ADAM_BETA1": 0.9,
    "OPTIM.ADAM_BETA2": 0.999,
    "OPTIM.STAGED_LR": False,
    "OPTIM.NEW_LAYERS": (),
    "OPTIM.BASE_LR_MULT": 0.1,
    "OPTIM.LR_SCHEDULER": "single_step",
    "OPTIM.STEPSIZE": (-1,),
    "OPTIM.GAMMA": 0.1,
    "OPTIM.MAX_EPOCH": 10,
    "OPTIM.WARMUP_EPOCH": -1,
    "OPTIM.WARMUP_TYPE": "linear",
    "OPTIM.WARMUP_CONS_LR": 1e-5,
    "OPTIM.WARMUP_MIN_LR": 1e-5,
    "OPTIM.WARMUP_RECOUNT": True,
    "TRAIN.CHECKPOINT_FREQ": 0,
    "TRAIN.PRINT_FREQ": 10,
    "TRAIN.COUNT_ITER": "train_x",
    "TEST.EVALUATOR": "Classification",
    "TEST.PER_CLASS_RESULT": False,
    "TEST.COMPUTE_CMAT": False,
    "TEST.NO_TEST": False,
    "TEST.SPLIT": "test",
    "TEST.FINAL_MODEL": "last_step",
    "TRAINER.NAME": "",
}


def test_defaults():
    from dassl.config import get_cfg_default

    for key, value in DEFAULTS.items():
        node = get_cfg_default()
        for part in key.split("."):
            node = node[part]
        assert node == value and type(node) is type(value), key


def test_each_call_returns_a_configuration_of_its_own():
    from dassl.config import get_cfg_default

    cfg = get_cfg_default()
    cfg.OPTIM.LR = 123.0
    cfg.INPUT.PIXEL_MEAN.append(0.5)
    cfg.TRAINER.MINE = CfgNode()
    other = get_cfg_default()
    assert other.OPTIM.LR == 0.0003 and len(other.INPUT.PIXEL_MEAN) == 3 and "MINE" not in other.TRAINER


def test_extended_merged_and_frozen_as_coops_train_py_does(tmp_path):
    from dassl.config import get_cfg_default

    cfg = get_cfg_default()
    cfg.TRAINER.COOP = CfgNode({"N_CTX": 16})
    cfg.DATASET.SUBSAMPLE_CLASSES = "all"
    yaml = tmp_path / "vit_b16.yaml"
    yaml.write_text('INPUT:\n  SIZE: (224, 224)\n  TRANSFORMS: ["random_flip"]\nOPTIM:\n  LR: 0.002\n')
    cfg.merge_from_file(str(yaml))
    cfg.merge_from_list(["TRAINER.COOP.N_CTX", "4", "DATALOADER.TRAIN_X.BATCH_SIZE", "8"])
    cfg.freeze()
    assert cfg.OPTIM.LR == 0.002 and cfg.TRAINER.COOP.N_CTX == 4
    assert cfg.INPUT.TRANSFORMS == ("random_flip",) and cfg.DATALOADER.TRAIN_X.BATCH_SIZE == 8
    with pytest.raises((AssertionError, KeyError), match="NO_SUCH_KEY"):
        cfg.merge_from_list(["OPTIM.NO_SUCH_KEY", "1"])


def test_clean_cfg_keeps_one_trainer(tmp_path):
    from dassl.config import clean_cfg

    cfg = tiny_cfg(tmp_path, tmp_path)
    cfg.TRAINER.COOP = CfgNode({"N_CTX": 16})
    cfg.TRAINER.OTHER = CfgNode()
    clean_cfg(cfg, "CoOp")
    assert sorted(cfg.TRAINER) == ["COOP", "NAME"]
