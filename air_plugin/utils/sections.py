"""Sections of a config as frozen dataclasses whose fields define their settings."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from air_plugin.utils.checks import require, require_choice, require_template

AUTO = "auto"  # in the place of a number that is chosen without labels, or of a switch that the run decides on
LARGEST = 1_000_000  # of numbers without a limit of their own: products of several are finite in single precision
LARGEST_WHOLE = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # NumPy's


@dataclass(frozen=True)
class Setting:
    """One setting of the config.

    key: full, for instance AIR.LORA.RANK.
    field: its name in the section's dataclass.
    low, above, high, below: the range of a number: low <= value, above < value, value <= high, value < below. Where
        there is no upper limit it is LARGEST, of whole numbers LARGEST_WHOLE.
    auto: the value may be `auto`; the dataclass then has None. With a default of `auto` it is a switch: else a bool.
    template: a text with one {} for the class name.
    filled: needs at least one element.
    old, old_values: former names of the key and of its values; usable for one release.
    """

    key: str
    field: str
    kind: Any
    default: Any
    help: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    auto: bool = False
    template: bool = False
    filled: bool = False
    old: tuple[str, ...] = ()
    old_values: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def range(self) -> str:
        """In words; empty where every value of the type is valid."""
        limits = {"greater than": self.above, "at least": self.low, "at most": self.high, "below": self.below}
        if self.low is not None and self.high is not None:
            text = f"in [{self.low:.10g}, {self.high:.10g}]"
        else:
            text = " and ".join(f"{word} {limit:.10g}" for word, limit in limits.items() if limit is not None)
        return f"{text}, or {AUTO}" if self.auto else text

    def read(self, cfg: Any) -> Any:
        """The value in a config, as the dataclass has it."""
        for part in self.key.split("."):
            cfg = cfg[part]
        if isinstance(self.default, tuple):
            return tuple(cfg)
        return None if self.auto and cfg == AUTO else cfg

    def check(self, value: Any) -> None:
        """Raise a UserError that names the key where a value, as the dataclass has it, is out of range."""
        if self.choices:
            require_choice(self.key, value, self.kind)
        elif self.template:
            require_template(self.key, value)
        elif self.filled:
            require(bool(value), self.key, value, "at least one module name")
        elif self.is_switch:
            require(value is None or isinstance(value, bool), self.key, repr(value), f"True, False or {AUTO}")
        elif self.is_number and not (self.auto and value is None):
            self._check_number(value)

    @property
    def is_switch(self) -> bool:
        """Whether the value is True, False or `auto`."""
        return self.auto and self.default == AUTO

    @property
    def is_number(self) -> bool:
        return type(self.default) in (int, float)

    def _check_number(self, value: Any) -> None:
        whole = isinstance(self.default, int)
        kind, name = (numbers.Integral, "a whole number") if whole else (numbers.Real, "a number")
        require(isinstance(value, kind) and not isinstance(value, bool), self.key, repr(value), name)
        low = (self.low is None or value >= self.low) and (self.above is None or value > self.above)
        high = (self.high is None or value <= self.high) and (self.below is None or value < self.below)
        # NaN fails every comparison
        require(low and high, self.key, value, self.range)
        largest = LARGEST_WHOLE if whole else LARGEST
        if self.high is None and self.below is None:
            require(value <= largest, self.key, value, f"at most {largest}")
        if self.low is None and self.above is None:
            require(value >= -largest, self.key, value, f"at least {-largest}")


def setting(default: Any, help: str, **definition: Any) -> Any:
    """A field of a section. `key` is its name in the config where that is not the field's in capitals."""
    return dataclasses.field(default=default, metadata={"help": help, **definition})


_Section = TypeVar("_Section", bound="Section")


class Section:
    """A section of the config: every value is checked when an instance is made."""

    SECTION: ClassVar[str]

    def __post_init__(self) -> None:
        for one in settings_of(type(self)):
            one.check(getattr(self, one.field))

    @classmethod
    def from_cfg(cls: type[_Section], cfg: Any) -> _Section:
        """Read and validate this section of a config.

        Raises:
            UserError: a value is out of range; the message names its key.
        """
        return cls(**{one.field: one.read(cfg) for one in settings_of(cls)})


def settings_of(section: type[Section]) -> tuple[Setting, ...]:
    """The settings of a section, in the order of their definition."""
    kinds = get_type_hints(section)
    found = []
    for one in dataclasses.fields(section):  # type: ignore[arg-type]  # every section is a dataclass
        if "help" in one.metadata:
            definition = dict(one.metadata)
            key = f"{section.SECTION}.{definition.pop('key', one.name.upper())}"
            old = tuple(f"{section.SECTION}.{name}" for name in definition.pop("old", ()))
            default = AUTO if one.default is None else one.default
            found.append(Setting(key, one.name, kinds[one.name], default, old=old, **definition))
    return tuple(found)
