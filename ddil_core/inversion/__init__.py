"""Find prompts for images: one file for each inverter, a table of inverters, and a loop that runs them in batches."""

from ddil_core.inversion.invert import InvertedPrompt, SelectionSettings, invert
from ddil_core.inversion.inverters import INVERTERS, get_inverter
from ddil_core.inversion.problem import InversionProblem, Inverter

__all__ = ["INVERTERS", "InversionProblem", "InvertedPrompt", "Inverter", "SelectionSettings", "get_inverter", "invert"]
