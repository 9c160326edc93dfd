"""Prompts of pictures: inverters of one signature, one file and one row each, and the loop that runs them in batches."""

from __future__ import annotations

from typing import Any

from ddil_core.inversion.batches import InvertedPrompt, SelectionSettings, invert
from ddil_core.inversion.pez import PEZ
from ddil_core.inversion.ph2p import PH2P
from ddil_core.inversion.problem import InversionProblem, Inverter
from ddil_core.inversion.random_words import RANDOM
from ddil_core.support.errors import WrongCommand
from ddil_core.support.protocol import Strict, validate

INVERTERS: dict[str, Inverter] = {inverter.name: inverter for inverter in (PH2P, PEZ, RANDOM)}


def get_inverter(name: str, settings: dict[str, Any]) -> tuple[Inverter, Strict]:
    """An inverter by name, with its settings.

    Raises:
        WrongCommand: there is no such inverter, or a setting that it does not have.
    """
    if name not in INVERTERS:
        raise WrongCommand(f"the inverter {name!r} is not known; it may be one of {', '.join(INVERTERS)}")
    return INVERTERS[name], validate(INVERTERS[name].settings, settings, f"the inverter {name!r}")


__all__ = ["INVERTERS", "InversionProblem", "InvertedPrompt", "Inverter", "SelectionSettings", "get_inverter", "invert"]
