"""Read a configuration from a YAML file, apply options over it, and validate it. Unknown keys are refused."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ddil_core.support.errors import WrongCommand
from ddil_core.support.keys import Takes, field_takes, numeric
from ddil_core.support.misfits import misfit
from ddil_core.support.outside import NotPlain
from ddil_core.support.paths import shown
from ddil_core.support.plain_yaml import DEPTH, load_plain, load_plain_file

MOST = 100_000_000
"""The largest count in a protocol or an option. A list of more prompts or images would fill the memory."""


class Strict(BaseModel):
    """A configuration that refuses unknown keys, NaN, infinities, true as a number, and counts above ``MOST``.

    A seed is no count.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false as numbers, which pydantic reads as 1 and 0."""
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and numeric(field.annotation):
            raise ValueError(f"it takes {field_takes(field)}, not {str(value).lower()}")
        return value

    @model_validator(mode="after")
    def _limit_counts(self) -> Self:
        for name, value in self:
            if type(value) is int and value > MOST and name != "seed":
                raise ValueError(f"{name} is at most {MOST:,}, not {value:,}")
        return self


FORMER_KEYS = {
    "images_per_prompt": "pictures_per_prompt",
    "reference_images": "reference_pictures",
    "choosing_images": "choosing_pictures",
}
"""Renamed keys of protocols, with their former names. Protocols may use both; records and hashes keep the former."""


def renamed(key: str, **settings: Any) -> Any:
    """Return the pydantic field of a renamed key; ``settings`` are those of ``pydantic.Field``."""
    former = FORMER_KEYS[key]
    return Field(validation_alias=AliasChoices(key, former), serialization_alias=former, **settings)


LARGEST_GUIDANCE = 1000.0
"""The largest guidance scale. Models are used at 1 to 20, and a product with a larger scale can overflow."""


def guidance_scale(value: float) -> float:
    """Return a valid guidance scale unchanged.

    Raises:
        ValueError: the scale is no finite number from 0 to ``LARGEST_GUIDANCE``.
    """
    if not 0 <= value <= LARGEST_GUIDANCE:  # NaN fails this too
        raise ValueError(f"a guidance scale is a finite number from 0 to {LARGEST_GUIDANCE:g}, not {value:g}")
    return value


def require_guidance(value: float) -> None:
    """Refuse a wrong guidance scale.

    Raises:
        WrongCommand: the scale is no finite number from 0 to ``LARGEST_GUIDANCE``.
    """
    try:
        guidance_scale(value)
    except ValueError as error:
        raise WrongCommand(str(error)) from error


GuidanceScale = Annotated[float, AfterValidator(guidance_scale), Takes(f"a number from 0 to {LARGEST_GUIDANCE:g}")]
"""The type of every guidance scale in a protocol."""


P = TypeVar("P", bound=BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of plain values (see :mod:`ddil_core.support.plain_yaml`).

    Raises:
        WrongCommand: the file does not exist, cannot be read, or is no YAML mapping of plain values.
    """
    if not path.is_file():
        raise WrongCommand(f"there is no protocol file {path}")
    try:
        content = load_plain_file(path)
    except OSError as error:
        raise WrongCommand(f"the protocol {path} cannot be read: {error.strerror}; make it readable") from error
    except NotPlain as error:
        raise WrongCommand(f"the protocol {path} {error}") from error
    if not isinstance(content, dict):
        raise WrongCommand(f"the protocol {path} holds no mapping of keys to values")
    return content


def override(content: dict[str, Any], settings: Iterable[str]) -> dict[str, Any]:
    """Return a copy of a mapping with ``KEY=VALUE`` settings applied.

    Dots go deeper, as in ``ddil.uses=2`` and ``stages.0.updates=10``. Values are YAML.

    Raises:
        WrongCommand: a setting has no "=", its key names no place, its value is no plain YAML, or the mapping has a
            renamed key by both names.
    """
    present = {former: key for key, former in FORMER_KEYS.items()}
    for former, key in present.items():
        if former in content and key in content:
            raise WrongCommand(f"the protocol has the key {key!r} and its former name {former!r}; remove {former!r}")
    content = {present.get(key, key): value for key, value in copy.deepcopy(content).items()}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise WrongCommand(f"--set takes KEY=VALUE, not {shown(setting)}")
        *parents, last = (present.get(part, part) for part in key.split("."))
        if len(parents) >= DEPTH:
            raise WrongCommand(f"--set {shown(setting)} names no place in the protocol")
        place: Any = content
        try:
            parsed = load_plain(value)
        except NotPlain as error:
            raise WrongCommand(f"--set {shown(setting)} has a value that {error}") from error
        except yaml.YAMLError as error:
            raise WrongCommand(f"--set {shown(setting)} has a value that is not YAML") from error
        try:
            for parent in parents:
                place = place[int(parent)] if isinstance(place, list) else place.setdefault(parent, {})
            place[int(last) if isinstance(place, list) else last] = parsed
        except (IndexError, ValueError, TypeError, AttributeError) as error:
            raise WrongCommand(f"--set {shown(setting)} names no place in the protocol") from error
    return content


def validate(model: type[P], content: dict[str, Any], source: str, options: Collection[str] = ()) -> P:
    """Make a configuration from a mapping.

    Args:
        model: The configuration's class.
        content: The mapping.
        source: Names the mapping in messages, as in "the protocol a.yaml".
        options: Keys that options of a command set. A message about such a key names the option.

    Raises:
        WrongCommand: a key is unknown (the message names the nearest known key) or missing, or a value does not fit.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise WrongCommand(misfit(error, model, source, options)) from error


def content_hash(content: Any) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
