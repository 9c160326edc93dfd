"""What ComfyUI's nodes take and compute, written from their definitions, so that a workflow can be checked without it."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Workflow = dict[str, Any]

NODES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": "COMBO"}, ("MODEL", "CLIP", "VAE")),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": "COMBO", "strength_model": "FLOAT"}, ("MODEL",)),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": "COMBO", "zsnr": "BOOLEAN"}, ("MODEL",)),
    "CLIPTextEncode": ({"clip": "CLIP", "text": "STRING"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": "INT", "height": "INT", "batch_size": "INT"}, ("LATENT",)),
    "KSamplerSelect": ({"sampler_name": "COMBO"}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": "STRING"}, ("SIGMAS",)),
    "SamplerCustom": (
        {
            "model": "MODEL",
            "add_noise": "BOOLEAN",
            "noise_seed": "INT",
            "cfg": "FLOAT",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "STRING"}, ()),
}
"""For each node: its required inputs with their types, and the types of its outputs."""
COMBOS = {"sampling": ("eps", "v_prediction", "lcm"), "sampler_name": ("euler", "lcm")}
WIDGETS = {"COMBO": str, "STRING": str, "FLOAT": float, "BOOLEAN": bool, "INT": int}


def faults(workflow: Workflow) -> list[str]:
    """What ComfyUI's validation would refuse: an unknown node or input, a missing input, a link of another type."""
    found = []
    for number, node in workflow.items():
        inputs, _ = NODES[node["class_type"]]
        if set(node["inputs"]) != set(inputs):
            found.append(f"{number}: inputs {sorted(set(node['inputs']) ^ set(inputs))}")
            continue
        for name, kind in inputs.items():
            value = node["inputs"][name]
            if kind in WIDGETS:
                fits = type(value) is WIDGETS[kind] and value in COMBOS.get(name, (value,))
            else:
                fits = value[0] in workflow and NODES[workflow[value[0]]["class_type"]][1][value[1]] == kind
            found += [] if fits else [f"{number}: {name} is {value!r}"]
    return found


def inputs_of(workflow: Workflow, kind: str) -> dict[str, Any]:
    """The inputs of the only node of a class."""
    (inputs,) = (node["inputs"] for node in workflow.values() if node["class_type"] == kind)
    return dict(inputs)


def parsed_sigmas(workflow: Workflow) -> Tensor:
    """What ``ManualSigmas`` makes of its text: decimal numbers without exponents, in float32."""
    return torch.tensor(
        [float(n) for n in re.findall(r"[-+]?(?:\d*\.*\d+)", inputs_of(workflow, "ManualSigmas")["sigmas"])]
    )


class Clock:
    """ComfyUI's discrete noise levels σ' = σ/α, and the timestep nearest to a level in log σ'."""

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        kept = torch.cumprod(1 - betas, 0)
        self.sigmas = ((1 - kept) / kept).sqrt().float()

    def timestep(self, sigma: Tensor) -> int:
        return int((sigma.log() - self.sigmas.log()).abs().argmin())

    def simple(self, steps: int) -> Tensor:
        """The scheduler ``simple``: every (1000/steps)-th level from the largest."""
        return torch.stack([self.sigmas[-(1 + int(step * 1000 / steps))] for step in range(steps)])

    def sgm_uniform(self, steps: int) -> Tensor:
        """The scheduler ``sgm_uniform``: evenly spaced times, and log σ' between those of two timesteps."""
        times, logs = torch.linspace(999, 0, steps + 1)[:-1], self.sigmas.log()
        return torch.lerp(logs[times.floor().long()], logs[times.ceil().long()], times.frac()).exp()

    def ddim_uniform(self, steps: int) -> Tensor:
        """The scheduler ``ddim_uniform``: every (1000/steps)-th level from the second smallest."""
        return self.sigmas[1 :: 1000 // steps].flip(0)


@torch.no_grad()
def sample(workflow: Workflow, network: Callable[[Tensor, Tensor], Tensor], z: Tensor, noise: Tensor) -> Tensor:
    """The latents of ``SamplerCustom`` from the noise ``z``, with ``noise[i]`` after step i of the sampler lcm.

    ``network(z, t)`` gives the output of the U-Net for the positive condition: with cfg 1 ComfyUI evaluates no other.
    """
    clock, sigmas = Clock(), parsed_sigmas(workflow)
    assert inputs_of(workflow, "SamplerCustom")["cfg"] == 1.0
    kind, sampler = inputs_of(workflow, "ModelSamplingDiscrete")["sampling"], inputs_of(workflow, "KSamplerSelect")
    largest = float(clock.sigmas[-1])
    full = abs(float(sigmas[0]) - largest) <= 1e-5 * largest or float(sigmas[0]) > largest
    x = z * (1 + sigmas[0] ** 2).sqrt() if full else z * sigmas[0]
    for step, (sigma, after) in enumerate(pairwise(sigmas)):
        scale = (sigma**2 + 1).sqrt()
        out = network(x / scale, torch.full((len(x),), clock.timestep(sigma)))
        denoised = x - sigma * out if kind == "eps" else x / scale**2 - out * sigma / scale
        if sampler["sampler_name"] == "lcm":
            x = denoised + (after * noise[step] if after > 0 else 0)
        else:
            x = x + (x - denoised) / sigma * (after - sigma)
    return x
