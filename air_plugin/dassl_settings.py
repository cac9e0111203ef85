"""The ranges of Dassl's numbers that a run depends on."""

from __future__ import annotations

from typing import Any

from air_plugin.utils.sections import LARGEST_SEED, Setting


def _number(key: str, kind: type, **limits: Any) -> Setting:
    return Setting(key, field="", kind=kind, default=kind(), help="", **limits)


# Of a list, every element has the range. A key that a version of Dassl does not have is left out.
DASSL_SETTINGS = (
    _number("SEED", int, low=-1, high=LARGEST_SEED),
    _number("INPUT.SIZE", int, low=1),
    _number("INPUT.PIXEL_MEAN", float),
    _number("INPUT.PIXEL_STD", float, above=0),
    _number("INPUT.CROP_PADDING", int, low=0),
    _number("INPUT.RRCROP_SCALE", float, above=0, high=1),
    _number("INPUT.CUTOUT_N", int, low=1),
    _number("INPUT.CUTOUT_LEN", int, low=1),
    _number("INPUT.GN_MEAN", float),
    _number("INPUT.GN_STD", float, low=0),
    _number("INPUT.RANDAUGMENT_N", int, low=0),
    _number("INPUT.RANDAUGMENT_M", int, low=0),
    _number("INPUT.COLORJITTER_B", float, low=0),
    _number("INPUT.COLORJITTER_C", float, low=0),
    _number("INPUT.COLORJITTER_S", float, low=0),
    _number("INPUT.COLORJITTER_H", float, low=0, high=0.5),
    _number("INPUT.RGS_P", float, low=0, high=1),
    _number("INPUT.GB_P", float, low=0, high=1),
    _number("INPUT.GB_K", int, low=1),
    _number("DATASET.NUM_LABELED", int, low=-1),
    _number("DATASET.NUM_SHOTS", int, low=-1),
    _number("DATASET.VAL_PERCENT", float, low=0, high=1),
    _number("DATALOADER.NUM_WORKERS", int, low=0, high=1024),
    _number("DATALOADER.K_TRANSFORMS", int, low=1),
    *(_number(f"DATALOADER.{part}.BATCH_SIZE", int, low=1) for part in ("TRAIN_X", "TRAIN_U", "TEST")),
    *(_number(f"DATALOADER.{part}.N_DOMAIN", int, low=0) for part in ("TRAIN_X", "TRAIN_U")),
    *(_number(f"DATALOADER.{part}.N_INS", int, low=1) for part in ("TRAIN_X", "TRAIN_U")),
    _number("MODEL.HEAD.DROPOUT", float, low=0, high=1),
    _number("OPTIM.LR", float, low=0),
    _number("OPTIM.WEIGHT_DECAY", float, low=0),
    _number("OPTIM.MOMENTUM", float, low=0, high=1),
    _number("OPTIM.SGD_DAMPNING", float, low=0, high=1),
    _number("OPTIM.RMSPROP_ALPHA", float, low=0, high=1),
    _number("OPTIM.ADAM_BETA1", float, low=0, below=1),
    _number("OPTIM.ADAM_BETA2", float, low=0, below=1),
    _number("OPTIM.BASE_LR_MULT", float, low=0),
    _number("OPTIM.STEPSIZE", int, low=-1),
    _number("OPTIM.GAMMA", float, low=0),
    _number("OPTIM.MAX_EPOCH", int, low=0),
    _number("OPTIM.WARMUP_EPOCH", int, low=-1),
    _number("OPTIM.WARMUP_CONS_LR", float, low=0),
    _number("OPTIM.WARMUP_MIN_LR", float, low=0),
    _number("TRAIN.CHECKPOINT_FREQ", int, low=0),
    _number("TRAIN.PRINT_FREQ", int, low=1),
)
