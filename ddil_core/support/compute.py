"""How models compute: their number format, TF32, and compiled code. It is a setting of every command that runs one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, model_validator

from ddil_core.support.devices import DTYPES, torch_dtype
from ddil_core.support.environment import float32_precision, is_deterministic
from ddil_core.support.errors import WrongCommand
from ddil_core.support.keys import Takes
from ddil_core.support.misfits import value_text
from ddil_core.support.paths import shown
from ddil_core.support.protocol import Strict
from ddil_core.support.text import listed

if TYPE_CHECKING:
    import torch

_SHORT = {full: short for short, full in DTYPES.items()}


@dataclass(frozen=True)
class Compute:
    """How a model computes. Networks of metrics always compute in float32 without TF32.

    Attributes:
        dtype: The dtype of the weights and of the arithmetic: ``fp32``, ``bf16`` or ``fp16``.
        tf32: Whether a GPU rounds the factors of float32 products to 10 bits (TF32).
        compile: Whether the denoising network and the decoder are compiled.
        deterministic: Whether only algorithms are used that give the same bits each time on the same device. It is a
            setting of the process (``--deterministic``) and no key of a protocol.
    """

    dtype: str = "fp32"
    tf32: bool = False
    compile: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise WrongCommand(f"the dtype {shown(self.dtype)} is not known; it may be one of {', '.join(DTYPES)}")

    @classmethod
    def of(cls, dtype: torch.dtype | str) -> Compute:
        """Return the plain computation in a dtype, by torch's object or by a short or long name.

        Raises:
            WrongCommand: a model cannot compute in this dtype.
        """
        full = torch_dtype(dtype) if isinstance(dtype, str) else dtype
        return cls(short_name(str(full).removeprefix("torch.")))

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype)

    def precision(self) -> AbstractContextManager[None]:
        """Return a context in which float32 products are computed as ``tf32`` says."""
        return float32_precision(tf32=self.tf32)

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults. Hashes and identities hold these alone.

        So what was measured before a setting existed keeps its hash.
        """
        defaults = asdict(FP32)
        return {key: value for key, value in asdict(self).items() if value != defaults[key]}

    def override(self, **settings: Any) -> Compute:
        """Return these settings with others in place of some. None keeps a setting."""
        return replace(self, **{key: value for key, value in settings.items() if value is not None})

    def require_device(self, device: torch.device) -> None:
        """Refuse a setting that has no effect on a device.

        Raises:
            WrongCommand: TF32 is asked for, and the device is no GPU.
        """
        if self.tf32 and device.type != "cuda":
            raise WrongCommand(f"TF32 is arithmetic of NVIDIA's GPUs, and the device is {device}; leave out --tf32")


FP32 = Compute()
"""float32 without TF32, not compiled: the default."""


def chosen_compute(**settings: Any) -> Compute:
    """Return how a command without a protocol computes: by its options, and as the process is set."""
    return FP32.override(**settings, deterministic=is_deterministic())


def short_name(dtype: Any) -> Any:
    """Return the short name of a dtype's long name, such as ``bf16`` for ``bfloat16``. Keep anything else."""
    return _SHORT.get(dtype, dtype) if isinstance(dtype, str) else dtype


def _listed(names: Iterable[str]) -> str:
    return listed([f"'{name}'" for name in names], "or")


def _read_as(names: Mapping[str, str]) -> Callable[[Any], Any]:
    """Return a function that takes a dtype by any name, and gives the one in ``names``, which go by its short name."""

    def read(dtype: Any) -> Any:
        short = short_name(dtype)
        if not isinstance(short, str) or short not in names:
            raise ValueError(f"it takes {_listed(names.values())}, not {value_text(dtype)}")
        return names[short]

    return read


DtypeName = Annotated[str, BeforeValidator(_read_as({name: name for name in DTYPES})), Takes(_listed(DTYPES))]
"""The type of a dtype in a protocol. Long names are read too, and the short one is kept."""
LongDtypeName = Annotated[str, BeforeValidator(_read_as(DTYPES)), Takes(_listed(DTYPES.values()))]
"""The type of a dtype in an older key of protocols, which keeps the long name."""


class ComputeKeys(Strict):
    """The keys of a protocol that say how its models compute (:class:`Compute`).

    Attributes:
        dtype: The number format that models compute in.
        tf32: Whether a GPU may use TF32 in float32 products.
        compile: Whether networks and decoders are compiled.
    """

    dtype: DtypeName = "fp32"
    tf32: bool = False
    compile: bool = False

    @property
    def compute(self) -> Compute:
        return Compute(self.dtype, self.tf32, self.compile, is_deterministic())


def with_network_dtypes(content: Any) -> Any:
    """Return the content of a protocol whose keys for the teacher's and the student's network default to ``dtype``."""
    dtype = content.get("dtype") if isinstance(content, dict) else None
    if not isinstance(dtype, str) or short_name(dtype) not in DTYPES:
        return content
    long = DTYPES[short_name(dtype)]
    return {"teacher_dtype": long, "student_dtype": long} | content


def require_effect(dtype: str | None, content: Mapping[str, Any]) -> None:
    """Refuse ``--dtype`` beside a protocol that gives both networks dtypes of their own, which the option leaves alone.

    Args:
        dtype: The value of the option; None without it.
        content: The protocol.

    Raises:
        WrongCommand: both networks would keep another dtype.
    """
    keys = ("teacher_dtype", "student_dtype")
    if dtype is not None and all(content.get(key) not in (None, dtype, DTYPES.get(dtype)) for key in keys):
        raise WrongCommand(
            f"--dtype {dtype} leaves both networks as they are, because the protocol gives them a teacher_dtype and a "
            "student_dtype; take the two keys out of it, or set them with --set"
        )


class NetworkDtypeKeys(ComputeKeys):
    """The keys of a protocol with a dtype for the teacher's and one for the student's network.

    The keys ``teacher_dtype`` and ``student_dtype`` of a subclass default to ``dtype``.
    """

    @model_validator(mode="before")
    @classmethod
    def _networks_take_the_dtype(cls, content: Any) -> Any:
        return with_network_dtypes(content)


def without_defaults(protocol: dict[str, Any]) -> dict[str, Any]:
    """Return a protocol without keys of ``Compute`` at their defaults. Its hash is that of older protocols."""
    defaults = asdict(FP32)
    return {key: value for key, value in protocol.items() if key not in defaults or value != defaults[key]}
