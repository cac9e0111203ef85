"""Every setting, defined once: key, type, default, range, meaning and former names.

A section of the config is a frozen dataclass, and a setting is one of its fields. The yacs node, the checks,
`air settings` and docs/configuration.md are made from these fields (air_plugin/config.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from air_plugin.dataset_settings import DatasetSettings
from air_plugin.transduction_settings import TransductionSettings
from air_plugin.utils.checks import require, require_template
from air_plugin.utils.sections import AUTO, LARGEST_SEED, Section, Setting, setting, settings_of

Captions = Literal["confident", "above_median", "all", "generic"]
LossForm = Literal["consistency", "synthetic"]
AuxiliaryForm = Literal["softmax", "raw"]
Head = Literal["text", "fused"]
Labeler = Literal["CPL", "UPL"]
CandidateLoss = Literal["cc", "rc", "lw", "cav"]
Modality = Literal["text", "visual", "multimodal"]
TokenPosition = Literal["end", "middle", "front"]
Prototypes = Literal["synthetic", "real"]
Prior = Literal["prototypes", "none"]
Classifier = Literal["cosine", "gaussian"]
Refinement = Literal["none", "em"]
PriorStrength = Literal["moments", "data"]
Sampler = Literal["dpm", "ddim", "euler", "lcm", "own"]

# Dassl's settings that the backbone decides: no YAML repeats them, and a run is refused where they name another value.
FROM_BACKBONE = ("INPUT.SIZE", "INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD")


@dataclass(frozen=True)
class PromptSettings(Section):
    """Prompt training, for every trainer that trains prompts."""

    SECTION = "TRAINER.PROMPT"

    modality: Modality = setting(
        "text",
        "what is learned: words before the class name (text, CoOp), tokens in the image tower (visual, VPT), or both "
        "(multimodal, UPT); the last two need a ViT, which runs in training",
    )
    n_ctx: int = setting(16, "context tokens; not read where CTX_INIT has words, nor in MODALITY visual", low=1)
    n_visual: int = setting(16, "tokens in the image tower, MODALITY visual and multimodal", low=1)
    ctx_init: str = setting("", "words that the context starts from; empty: random numbers")
    csc: bool = setting(False, "a context of its own for every class")
    class_token_position: TokenPosition = setting("end", "where the class name stands in the prompt")
    prec: str = setting("fp32", "precision of the backbone's weights: fp32, fp16 or bf16")
    autocast: bool = setting(
        True, "on a GPU with tensor cores, compute image features in fp16 where PREC is fp32; the weights stay in fp32"
    )
    views: int = setting(8, "views of an image in the feature table; the first is not augmented", low=1)
    image_views: int = setting(
        1, "the same for the prepared images of MODALITY visual and multimodal; 1: no augmentation, as published", low=1
    )
    checkpointing: bool = setting(
        True, "on a GPU, MODALITY visual and multimodal: compute the tower's activations twice instead of keeping them"
    )
    clip_grad: float = setting(0.0, "largest norm of the gradient; 0: no limit", low=0)
    ensemble: int = setting(1, "prompts trained side by side, predictions averaged; UPL's paper has 16", low=1)
    rounds: int = setting(
        1, "rounds of labelling and training of OPTIM.MAX_EPOCH epochs each; unsupervised trainers only", low=1
    )


@dataclass(frozen=True)
class UplSettings(Section):
    """UPL's pseudo-labels."""

    SECTION = "TRAINER.UPL"

    per_class: int = setting(16, "most confident images a class that get a hard label", low=1)


@dataclass(frozen=True)
class CplSettings(Section):
    """CPL's pseudo-labels and loss."""

    SECTION = "TRAINER.CPL"

    alpha: float = setting(
        0.75, "quantile of the candidates within an image (CPL, intra-instance); 0: the mean", low=0, high=1
    )
    beta: float = setting(0.9, "quantile of the candidates within a class (CPL, inter-instance)", low=0, high=1)
    gamma: float = setting(0.0, "above 0: BETA is 1 - GAMMA / C for C classes", low=0)
    per_class: int = setting(16, "places in the pool of each class, in a single round", low=1)
    loss: CandidateLoss = setting("cc", "loss over the candidates of an image")
    leverage: float = setting(2.0, "weight of the classes that are no candidates, in the loss lw", low=0)


@dataclass(frozen=True)
class GripSettings(Section):
    """GRIP's pseudo-labels."""

    SECTION = "TRAINER.GRIP"

    per_class: int = setting(16, "places on the leaderboard of each class, in a single round (FPL)", low=1)


@dataclass(frozen=True)
class LabelerSettings(Section):
    """The trainer AiR."""

    SECTION = "TRAINER.AIR"

    labeler: Labeler = setting("CPL", "whose pseudo-labels AiR improves: candidate sets (CPL) or hard labels (UPL)")


@dataclass(frozen=True)
class RunSettings(Section):
    """Where and how the auxiliary classifier is made."""

    SECTION = "AIR"

    cache: str = setting("", "folder of the store; empty: cache/ in the output folder")
    threads: int = setting(0, "threads of torch on the CPU; 0: torch's own number", low=0)
    cuda_graphs: bool = setting(True, "on a GPU, capture training steps as CUDA graphs; the same up to rounding")
    generation_per_seed: bool = setting(False, "every seed has its own adapter and images; else all share one set")
    generation_seed: int = setting(0, "seed of the shared set", low=0, high=LARGEST_SEED)


@dataclass(frozen=True)
class DropInSettings(Section):
    """What a drop-in reads in place of keys that a host may use otherwise; trainers of this repository refuse them."""

    SECTION = "AIR"

    backbone: str = setting(
        "", "of zero-shot labels and kept images; a name, folder or ARCHITECTURE:FILE; empty: MODEL.BACKBONE.NAME"
    )
    backbone_precision: Literal["fp32", "fp16", "bf16"] = setting("fp32", "precision of that backbone")
    template: str = setting("", "captions, and prompts of the zero-shot labels; empty: DATASET.TEMPLATE")


@dataclass(frozen=True)
class LoraSettings(Section):
    """How the generator is adapted to the unlabelled images."""

    SECTION = "AIR.LORA"

    enabled: bool = setting(True, "adapt the generator; False: use it as it is")
    rank: int = setting(16, "rank of the adapter", low=1)
    targets: tuple[str, ...] = setting(
        ("to_q", "to_k", "to_v", "to_out.0"), "modules of the U-Net or transformer that are adapted", filled=True
    )
    steps: int = setting(1000, "training steps", low=1)
    lr: float = setting(1e-4, "learning rate", above=0)
    batch: int = setting(16, "images a step", low=1)
    captions: Captions = setting(
        "confident",
        "confident: the PER_CLASS most confident images of each class; above_median: those of them above the median "
        "confidence, without seemingly rare classes; all; generic: one caption without a class name",
        old_values={"surer_half": "above_median"},
    )
    per_class: int = setting(32, "images a class where CAPTIONS is confident or above_median", low=1)
    generic: str = setting("a photo.", "the caption where CAPTIONS is generic")
    checkpoint: int = setting(50, "steps between two checkpoints", low=1)


@dataclass(frozen=True)
class AirSettings(Section):
    """The auxiliary classifier.

    weight, beta, compile: None where the config has `auto`.
    prompt: never empty, the data set's template where AIR.PROMPT is. seed: of adapter and images.
    cuda_graphs: whether LoRA's steps are captured as a CUDA graph on a GPU.
    """

    SECTION = "AIR"

    primary: Head = setting(
        "fused", "classifier whose accuracy is the run's; the other one is reported, too", old=("HEADLINE",)
    )
    weight: float | None = setting(2.0, "lambda, weight of p^ in p* = p + lambda p^", key="LAMBDA", low=0, auto=True)
    beta: float | None = setting(1.0, "weight of L_s in training; auto needs LS synthetic", low=0, auto=True)
    loss: LossForm = setting(
        "consistency", "L_s: consistency of two views, or cross entropy on kept synthetic images", key="LS"
    )
    prototypes: Prototypes = setting(
        "synthetic", "where prototypes come from; real (a control): unlabelled images by their zero-shot label"
    )
    prior: Prior = setting(
        "prototypes", "prior of REFINE em: the classes of the prototypes; none: no prior, EM from zero-shot"
    )
    prior_strength: PriorStrength = setting(
        "moments",
        "images that a generated class mean counts for in REFINE em: moments: one number, estimated from the distance "
        "to the unlabelled images; data: a number for each class, estimated from the text predictions",
    )
    auxiliary: Classifier = setting(
        "cosine", "cosine: the paper's mean cosine; gaussian: class means of all M images and one covariance"
    )
    refine: Refinement = setting("none", "em: carry the Gaussian classes to the unlabelled images")
    rounds: int = setting(
        1, "rounds of LoRA, images and labels: the labels of one are the captions of the next; may stop early", low=1
    )
    images_per_class: int = setting(120, "images generated a class", key="M", low=1)
    kept_per_class: int = setting(30, "images kept a class, the most typical ones: the prototypes", key="K", low=1)
    filter_top: int = setting(
        0,
        "above 0: drop synthetic images whose class is not among the text classifier's FILTER_TOP classes, before K of "
        "them are chosen; 0: no filter, as published",
        low=0,
    )
    form: AuxiliaryForm = setting("softmax", "p^ = softmax(AUX_SCALE * s * a), or raw: p^ = a", key="AUX_FORM")
    scale: float = setting(2.0, "factor on CLIP's logit scale s in p^, AUX_FORM softmax", key="AUX_SCALE", above=0)
    generator: str = setting("mini", "mini (embedded), OWNER/MODEL on the hub, or a folder in diffusers' layout")
    revision: str = setting("", "commit of the generator's files on the hub; empty: the newest")
    variant: str = setting("", "of the weight files, for instance fp16")
    scheduler: Sampler = setting("dpm", "sampler of the images; own: the generator's")
    lcm_lora: str = setting("", "adapter of a few-step model, used while generating: OWNER/MODEL, folder or file")
    lcm_lora_revision: str = setting("", "its commit on the hub; empty: the newest")
    safety_checker: bool = setting(False, "use the generator's safety checker; images that it blackens are made again")
    precision: str = setting("fp32", "precision of the generator: fp32, fp16 or bf16")
    int8: bool = setting(False, "8-bit weights of the generator's blocks: half of bf16's memory, other images")
    prompt: str = setting("", "prompt of the images; empty: DATASET.TEMPLATE", template=True)
    steps: int = setting(20, "sampling steps; at most 50 where SCHEDULER is lcm", low=1, high=1000)
    guidance: float = setting(
        2.0, "classifier-free guidance; about 2 for an adapted generator, 8 to 9.5 for one that is not", low=0
    )
    size: int = setting(256, "side of the images in pixels, in training and generation", low=1)
    batch: int = setting(16, "images generated at once; halved where the memory is too small", low=1)
    compile: bool | None = setting(
        None,
        "torch.compile of the U-Net or transformer; auto: on a GPU, where 5,000 or more images are missing",
        auto=True,
    )
    seed: int = 0
    cuda_graphs: bool = True
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.kept_per_class <= self.images_per_class,
            "AIR.K",
            self.kept_per_class,
            f"at most AIR.M = {self.images_per_class}, the number of images a class",
        )
        if self.scheduler == "lcm":
            require(self.steps <= 50, "AIR.STEPS", self.steps, "at most 50 where AIR.SCHEDULER is lcm")
        self._require_what_goes_together()

    def _require_what_goes_together(self) -> None:
        if self.refine == "em":
            require(self.auxiliary == "gaussian", "AIR.AUXILIARY", self.auxiliary, "gaussian where AIR.REFINE is em")
        if self.filter_top:
            require(self.prototypes == "synthetic", "AIR.FILTER_TOP", self.filter_top, "0 where prototypes are real")
        if self.prior_strength == "data":
            expected = "moments where AIR.REFINE is not em, or AIR.PRIOR is none"
            usual = self.refine == "em" and self.prior == "prototypes"
            require(usual, "AIR.PRIOR_STRENGTH", self.prior_strength, expected)
        if self.prior == "none":
            require(self.refine == "em", "AIR.REFINE", self.refine, "em where AIR.PRIOR is none")
        if self.rounds > 1:
            expected = "1 where nothing is adapted: AIR.PROTOTYPES is not synthetic, or AIR.LORA.ENABLED is False"
            require(self.prototypes == "synthetic" and self.lora.enabled, "AIR.ROUNDS", self.rounds, expected)
        if self.beta is None:
            expected = f"synthetic where AIR.BETA is {AUTO}: two views have no label to be right about"
            require(self.loss == "synthetic", "AIR.LS", self.loss, expected)
        if self.form == "raw":
            expected = "softmax where AIR.AUXILIARY is gaussian or AIR.LAMBDA is auto"
            require(self.auxiliary == "cosine" and self.weight is not None, "AIR.AUX_FORM", self.form, expected)

    @property
    def loading(self) -> dict[str, Any]:
        """How the generator is loaded: load_generator's arguments after the name."""
        adapter = ("lcm_lora", "lcm_lora_revision")
        keys = ("revision", "variant", "scheduler", *adapter, "safety_checker", "precision", "int8")
        return {key: getattr(self, key) for key in keys}

    @classmethod
    def from_cfg(cls, cfg: Any) -> AirSettings:
        """Read and validate AIR and AIR.LORA of a config.

        Raises:
            UserError: a value is out of range; the message names its key.
        """
        values = {one.field: one.read(cfg) for one in settings_of(cls)}
        if not values["prompt"]:
            values["prompt"] = template_of(cfg)
        run = RunSettings.from_cfg(cfg)
        seed = max(cfg.SEED, 0) if run.generation_per_seed else run.generation_seed
        return cls(**values, seed=seed, cuda_graphs=run.cuda_graphs, lora=LoraSettings.from_cfg(cfg))


def template_of(cfg: Any) -> str:
    """The template of captions, zero-shot labels and generated images.

    Raises:
        UserError: it is no text with one {}; the message names its key.
    """
    if cfg.AIR.TEMPLATE:
        require_template("AIR.TEMPLATE", cfg.AIR.TEMPLATE)
        return cfg.AIR.TEMPLATE
    require_template("DATASET.TEMPLATE", cfg.DATASET.TEMPLATE)
    return cfg.DATASET.TEMPLATE


SECTIONS: tuple[type[Section], ...] = (
    DatasetSettings,
    PromptSettings,
    UplSettings,
    CplSettings,
    GripSettings,
    LabelerSettings,
    TransductionSettings,
    RunSettings,
    DropInSettings,
    AirSettings,
    LoraSettings,
)


def all_settings() -> list[Setting]:
    """Every setting, in the order of the sections."""
    return [one for section in SECTIONS for one in settings_of(section)]
