"""Every setting: the yacs keys with their defaults, and the frozen, validated dataclasses that the library takes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from air_plugin.utils.checks import require, require_choice, require_template
from air_plugin.utils.errors import UserError, unknown

Captions = Literal["confident", "surer_half", "all", "generic"]
LossForm = Literal["consistency", "synthetic"]
AuxiliaryForm = Literal["softmax", "raw"]
Head = Literal["text", "fused"]
Labeler = Literal["CPL", "UPL"]
Source = Literal["synthetic", "real", "none"]
Classifier = Literal["cosine", "gaussian"]
Refinement = Literal["none", "em"]
Sampler = Literal["dpm", "ddim", "euler", "lcm", "own"]

AUTO = "auto"  # in the place of a number that is then chosen without labels
MAY_BE_AUTO = ("AIR.LAMBDA", "AIR.BETA")


def add_air_config(cfg: Any) -> None:
    """Add our keys to a Dassl config (a yacs CfgNode), before files and options are merged."""
    from yacs.config import CfgNode

    cfg.DATASET.SUBSAMPLE_CLASSES = "all"  # CoOp's own data sets read it
    cfg.DATASET.SPLIT_FAMILY = "zhou"  # or elevater: the data set's own train and test lists
    cfg.DATASET.WORDING = "coop"  # of the class names; grip: GRIP's and CPL's, where a data set has both
    cfg.DATASET.TEMPLATE = "a photo of a {}."
    cfg.DATASET.MISSING = 0  # digits sets alone: classes that the unlabelled images lack; an experiment, not the method
    cfg.DATASET.RARER = 1.0  # digits sets alone: every other class is so many times rarer there
    cfg.DATASET.DEFAULT_CONFIG = ""  # the trainer config that the scripts use where none is named

    cfg.TRAINER.PROMPT = CfgNode()
    cfg.TRAINER.PROMPT.N_CTX = 16
    cfg.TRAINER.PROMPT.CTX_INIT = ""
    cfg.TRAINER.PROMPT.CSC = False
    cfg.TRAINER.PROMPT.CLASS_TOKEN_POSITION = "end"
    cfg.TRAINER.PROMPT.PREC = "fp32"
    cfg.TRAINER.PROMPT.VIEWS = 8  # views an image in the feature table; the first is not augmented
    cfg.TRAINER.PROMPT.CLIP_GRAD = 0.0  # largest norm of the gradient; 0 is no limit
    cfg.TRAINER.PROMPT.ENSEMBLE = 1  # prompts that are trained side by side and whose predictions are averaged
    cfg.TRAINER.PROMPT.ROUNDS = 1  # of labelling and training, OPTIM.MAX_EPOCH epochs each; unsupervised trainers only

    cfg.TRAINER.UPL = CfgNode()
    cfg.TRAINER.UPL.PER_CLASS = 16

    cfg.TRAINER.CPL = CfgNode()
    cfg.TRAINER.CPL.ALPHA = 0.75
    cfg.TRAINER.CPL.BETA = 0.9
    cfg.TRAINER.CPL.GAMMA = 0.0  # above 0: BETA is 1 - GAMMA / C
    cfg.TRAINER.CPL.PER_CLASS = 16  # in a single round
    cfg.TRAINER.CPL.LOSS = "cc"
    cfg.TRAINER.CPL.LEVERAGE = 1.0  # weight of the classes that are no candidates in the loss 'lw'

    cfg.TRAINER.AIR = CfgNode()
    cfg.TRAINER.AIR.LABELER = "CPL"

    cfg.TRAINER.TRANSCLIP = CfgNode()
    cfg.TRAINER.TRANSCLIP.ENABLED = False  # refine every head over all test images at once (transductive)

    cfg.AIR = CfgNode()
    cfg.AIR.CACHE = ""  # folder of the artifacts; empty: cache/ in the output folder
    cfg.AIR.THREADS = 0  # of torch on the CPU; 0 leaves torch's own number
    cfg.AIR.PRIMARY = "fused"
    cfg.AIR.LAMBDA = 2.0  # or auto
    cfg.AIR.BETA = 1.0  # or auto
    cfg.AIR.LS = "consistency"
    cfg.AIR.SOURCE = "synthetic"  # of the prototypes; controls: "real", unlabelled images by their zero-shot label;
    # "none", EM from zero-shot without any prototypes (what shows and trains as prototypes is as with "real")
    cfg.AIR.AUXILIARY = "cosine"  # or gaussian: class means of all M images and one covariance (air_plugin/gaussian.py)
    cfg.AIR.REFINE = "none"  # or em: the Gaussian classes are carried to the unlabelled images
    cfg.AIR.ROUNDS = 1  # the labels of a round are the captions of the next one's LoRA; fewer where they stop changing
    cfg.AIR.M = 120
    cfg.AIR.K = 30
    cfg.AIR.AUX_FORM = "softmax"
    cfg.AIR.AUX_SCALE = 2.0  # p^ = softmax(AUX_SCALE * s * a)
    cfg.AIR.GENERATION_PER_SEED = False
    cfg.AIR.GENERATION_SEED = 0  # where one set of images serves all seeds

    cfg.AIR.GENERATOR = "mini"  # or OWNER/MODEL on the hub, or a folder in diffusers' layout
    cfg.AIR.REVISION = ""  # commit of the hub's files; empty is the newest
    cfg.AIR.VARIANT = ""  # of the weight files, for instance fp16: unet/diffusion_pytorch_model.fp16.safetensors
    cfg.AIR.SCHEDULER = "dpm"  # of the drawing; own: the one that the generator comes with
    cfg.AIR.LCM_LORA = ""  # adapter of a few-step model, in use while drawing: OWNER/MODEL on the hub, folder or file
    cfg.AIR.LCM_LORA_REVISION = ""
    cfg.AIR.SAFETY_CHECKER = False  # use the generator's own one, if it has one; what it blackens is drawn again
    cfg.AIR.PRECISION = "fp32"
    cfg.AIR.PROMPT = ""  # empty: the data set's template
    cfg.AIR.STEPS = 20
    cfg.AIR.GUIDANCE = 7.5
    cfg.AIR.SIZE = 256  # side in pixels, for training and drawing; most backbones see 224
    cfg.AIR.BATCH = 16

    cfg.AIR.LORA = CfgNode()
    cfg.AIR.LORA.ENABLED = True
    cfg.AIR.LORA.RANK = 16
    cfg.AIR.LORA.TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
    cfg.AIR.LORA.STEPS = 1000
    cfg.AIR.LORA.LR = 1e-4
    cfg.AIR.LORA.BATCH = 16
    cfg.AIR.LORA.CAPTIONS = "confident"  # or surer_half: without doubtful images and seemingly rare classes
    cfg.AIR.LORA.PER_CLASS = 32  # images a class where CAPTIONS is "confident" or "surer_half"
    cfg.AIR.LORA.GENERIC = "a photo."  # the one caption where CAPTIONS is "generic"
    cfg.AIR.LORA.CHECKPOINT = 50  # steps between two checkpoints


@dataclass(frozen=True)
class LoraSettings:
    """How the generator is adapted. Names as in AIR.LORA."""

    enabled: bool
    rank: int
    targets: tuple[str, ...]
    steps: int
    lr: float
    batch: int
    captions: Captions
    per_class: int
    generic: str
    checkpoint: int

    def __post_init__(self) -> None:
        for key in ("rank", "steps", "batch", "per_class", "checkpoint"):
            require(getattr(self, key) >= 1, f"AIR.LORA.{key.upper()}", getattr(self, key), "at least 1")
        require(self.lr > 0, "AIR.LORA.LR", self.lr, "greater than 0")
        require(bool(self.targets), "AIR.LORA.TARGETS", self.targets, "at least one module name")
        require_choice("AIR.LORA.CAPTIONS", self.captions, Captions)


@dataclass(frozen=True)
class AirSettings:
    """The auxiliary classifier's settings. Names as in AIR; `prompt` is a template with {}.

    weight, beta: AIR.LAMBDA and BETA, or None where they are "auto": chosen without labels (air_plugin/weighting.py).
    """

    primary: Head
    weight: float | None
    beta: float | None
    loss: LossForm
    source: Source
    auxiliary: Classifier
    refine: Refinement
    rounds: int
    images_per_class: int
    kept_per_class: int
    form: AuxiliaryForm
    scale: float
    seed: int
    generator: str
    revision: str
    variant: str
    scheduler: Sampler
    lcm_lora: str
    lcm_lora_revision: str
    safety_checker: bool
    precision: str
    prompt: str
    steps: int
    guidance: float
    size: int
    batch: int
    lora: LoraSettings

    def __post_init__(self) -> None:
        require(self.weight is None or self.weight >= 0, "AIR.LAMBDA", self.weight, f"at least 0, or {AUTO}")
        require(self.beta is None or self.beta >= 0, "AIR.BETA", self.beta, f"at least 0, or {AUTO}")
        require(self.kept_per_class >= 1, "AIR.K", self.kept_per_class, "at least 1")
        require(
            self.kept_per_class <= self.images_per_class,
            "AIR.K",
            self.kept_per_class,
            f"at most AIR.M = {self.images_per_class}, the number of images a class",
        )
        require(self.scale > 0, "AIR.AUX_SCALE", self.scale, "greater than 0")
        require(self.guidance >= 0, "AIR.GUIDANCE", self.guidance, "at least 0")
        for key, value in (("STEPS", self.steps), ("SIZE", self.size), ("BATCH", self.batch)):
            require(value >= 1, f"AIR.{key}", value, "at least 1")
        if self.scheduler == "lcm":
            require(self.steps <= 50, "AIR.STEPS", self.steps, "at most 50 where AIR.SCHEDULER is lcm")
        require_template("AIR.PROMPT", self.prompt)
        require_choice("AIR.PRIMARY", self.primary, Head)
        require_choice("AIR.LS", self.loss, LossForm)
        require_choice("AIR.SOURCE", self.source, Source)
        require_choice("AIR.AUXILIARY", self.auxiliary, Classifier)
        require_choice("AIR.REFINE", self.refine, Refinement)
        require_choice("AIR.AUX_FORM", self.form, AuxiliaryForm)
        require_choice("AIR.SCHEDULER", self.scheduler, Sampler)
        self._require_what_goes_together()

    def _require_what_goes_together(self) -> None:
        require(self.rounds >= 1, "AIR.ROUNDS", self.rounds, "at least 1")
        if self.refine == "em":
            require(self.auxiliary == "gaussian", "AIR.AUXILIARY", self.auxiliary, "gaussian where AIR.REFINE is em")
        if self.source == "none":
            require(self.refine == "em", "AIR.REFINE", self.refine, "em where AIR.SOURCE is none")
        if self.rounds > 1:
            wanted = "1 where nothing is adapted: AIR.SOURCE is not synthetic, or AIR.LORA.ENABLED is False"
            require(self.source == "synthetic" and self.lora.enabled, "AIR.ROUNDS", self.rounds, wanted)
        if self.beta is None:
            wanted = f"synthetic where AIR.BETA is {AUTO}: two views have no label to be right about"
            require(self.loss == "synthetic", "AIR.LS", self.loss, wanted)
        if self.form == "raw":
            wanted = "softmax where AIR.AUXILIARY is gaussian or AIR.LAMBDA is auto"
            require(self.auxiliary == "cosine" and self.weight is not None, "AIR.AUX_FORM", self.form, wanted)

    @property
    def loading(self) -> dict[str, Any]:
        """How the generator is loaded: load_generator's arguments after the name."""
        keys = ("revision", "variant", "scheduler", "lcm_lora", "lcm_lora_revision", "safety_checker", "precision")
        return {key: getattr(self, key) for key in keys}

    @classmethod
    def from_cfg(cls, cfg: Any) -> AirSettings:
        """Read and validate the AIR part of a config.

        Raises:
            UserError: a value is out of range; the message names its key.
        """
        air = cfg.AIR
        lora = {key.lower(): value for key, value in air.LORA.items()}
        return cls(
            primary=air.PRIMARY,
            weight=None if air.LAMBDA == AUTO else air.LAMBDA,
            beta=None if air.BETA == AUTO else air.BETA,
            loss=air.LS,
            source=air.SOURCE,
            auxiliary=air.AUXILIARY,
            refine=air.REFINE,
            rounds=air.ROUNDS,
            images_per_class=air.M,
            kept_per_class=air.K,
            form=air.AUX_FORM,
            scale=air.AUX_SCALE,
            seed=max(cfg.SEED, 0) if air.GENERATION_PER_SEED else air.GENERATION_SEED,
            generator=air.GENERATOR,
            revision=air.REVISION,
            variant=air.VARIANT,
            scheduler=air.SCHEDULER,
            lcm_lora=air.LCM_LORA,
            lcm_lora_revision=air.LCM_LORA_REVISION,
            safety_checker=air.SAFETY_CHECKER,
            precision=air.PRECISION,
            prompt=air.PROMPT or cfg.DATASET.TEMPLATE,
            steps=air.STEPS,
            guidance=air.GUIDANCE,
            size=air.SIZE,
            batch=air.BATCH,
            lora=LoraSettings(**{**lora, "targets": tuple(air.LORA.TARGETS)}),
        )


def merge_file(
    cfg: Any, path: str | Path, *, sections: Sequence[str] | None = None, _above: tuple[Path, ...] = ()
) -> None:
    """Merge a YAML file into a config. Its key `_BASE_` names a file, relative to it, or a list of such, merged first.

    Args:
        cfg: a yacs CfgNode.
        path: the file.
        sections: the top-level keys to take; None is all.

    Raises:
        UserError: the file is missing or no YAML, or a key is unknown or of another type.
    """
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        folder = Path(path).parent
        known = [file.stem for file in folder.glob("*.yaml")]
        raise unknown(f"config file in {folder}", Path(path).stem, known) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"config file {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"config file {path} is no mapping of keys to values")
    base = tree.pop("_BASE_", None)
    for name in base if isinstance(base, list) else [base] if base else []:
        above = (*_above, Path(path).resolve())
        below = (Path(path).parent / str(name)).resolve()
        if below in above:
            raise UserError(f"config file {path}: its _BASE_ {name} leads back to it")
        merge_file(cfg, below, sections=sections, _above=above)
    if sections is not None:
        tree = {key: value for key, value in tree.items() if key in sections}
    _merge(cfg, tree, prefix="", where=f" in {path}")


def merge_options(cfg: Any, options: Sequence[str]) -> None:
    """Merge KEY VALUE pairs of a command line into a config; values are read as YAML.

    Raises:
        UserError: as `merge_file`, or a key without its value.
    """
    import yaml

    if len(options) % 2:
        raise UserError(f"options are pairs of KEY VALUE; '{options[-1]}' has no partner")
    texts = {key for key, value in flatten(cfg).items() if isinstance(value, str)}
    for key, text in zip(options[::2], options[1::2], strict=True):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
        if key in texts and not isinstance(value, str):
            value = text  # "{}", "style: a {}", "no" and the like are text where text is wanted
        for part in reversed(key.split(".")):
            value = {part: value}
        _merge(cfg, value, prefix="", where="")


def _merge(cfg: Any, tree: Mapping[str, Any], *, prefix: str, where: str) -> None:
    from yacs.config import CfgNode

    for name, value in tree.items():
        key = f"{prefix}{name}"
        if name not in cfg:
            raise unknown(f"config key{where}", key, flatten(cfg, prefix))
        old = cfg[name]
        if isinstance(old, CfgNode):
            if not isinstance(value, Mapping):
                raise UserError(f"{key}{where} is a section, not a value; its keys: {', '.join(old)}")
            _merge(old, value, prefix=f"{key}.", where=where)
        else:
            if key in MAY_BE_AUTO and AUTO in (old, value):
                old = value if value == AUTO else 0.0
            cfg[name] = _coerce(old, value, f"{key}{where}")


def _coerce(old: Any, value: Any, key: str) -> Any:
    """A value as the type that its key has."""
    import yaml

    if isinstance(old, (list, tuple)) and isinstance(value, str) and value[:1] == "(" and value[-1:] == ")":
        with contextlib.suppress(yaml.YAMLError):
            value = yaml.safe_load(f"[{value[1:-1]}]")  # yacs' way of writing a tuple
    if isinstance(old, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4 as text
        except ValueError:
            pass
    elif isinstance(old, str) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    elif isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
        return type(old)(value)
    elif old is None or type(old) is type(value) or (isinstance(old, str) and value is None):
        return "" if value is None and isinstance(old, str) else value
    raise UserError(f"{key} is {value!r}, a {type(value).__name__}; it must be a {type(old).__name__}")


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Every value of a config by its full key."""
    from yacs.config import CfgNode

    values: dict[str, Any] = {}
    for name, value in cfg.items():
        values.update(flatten(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else {f"{prefix}{name}": value})
    return values
