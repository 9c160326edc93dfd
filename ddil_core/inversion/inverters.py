"""The table of inverters, and an inverter with its settings by name."""

from __future__ import annotations

from typing import Any

from ddil_core.inversion.pez import PEZ
from ddil_core.inversion.ph2p import PH2P
from ddil_core.inversion.problem import Inverter
from ddil_core.inversion.random_words import RANDOM
from ddil_core.support.protocol import Strict, validate
from ddil_core.support.registry import Registry

INVERTERS: Registry[Inverter] = Registry("inverter", "ddil.inverters", Inverter, (PH2P, PEZ, RANDOM))


def get_inverter(name: str, settings: dict[str, Any]) -> tuple[Inverter, Strict]:
    """Return the inverter of this name, and its validated settings.

    Raises:
        WrongCommand: there is no such inverter, or it has no such setting.
    """
    inverter = INVERTERS.find(name)
    return inverter, validate(inverter.settings, settings, f"the inverter {name!r}")
