"""Patch FID, as DMD2 measures SDXL: FID between the pictures' 299 px middles, which Inception then sees at their own scale.

The recipe cuts the patch (``ddil_eval.features.recipes``). So this is FID's network on other images, under another name.
"""

from __future__ import annotations

from dataclasses import replace

from ddil_eval.metrics.fid import FID
from ddil_eval.metrics.inception import INCEPTION

PATCH_FID = replace(
    FID,
    name="patch_fid",
    title="FID of centre patches, of a recipe that cuts them",
    network=replace(INCEPTION, name="inception_patch"),
)
