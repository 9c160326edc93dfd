"""Networks in the form that is quick on their device. Long runs may compile them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from ddil_core.diffusion.denoiser import NetworkDenoiser
from ddil_core.support.compute import Compute
from ddil_core.support.errors import DdilError


def prepare_networks(denoiser: NetworkDenoiser, vae: Any, device: torch.device, compute: Compute) -> None:
    """Bring the networks that draw into the form that is quick on the device.

    Raises:
        DdilError: they are to be compiled, and this machine cannot compile.
    """
    if device.type == "cuda" and compute.dtype != "fp32":  # tensor cores read the channels of a pixel together
        for net in (denoiser.net, vae):
            net.to(memory_format=torch.channels_last)
    if compute.compile:
        compile_module(denoiser.net, device)
        compile_module(vae.decoder, device)
        denoiser.reuses_output = device.type == "cuda"


def compile_module(module: nn.Module, device: torch.device, *, static: bool = True) -> None:
    """Compile a network in place, at its first call. Its weights, names and configuration stay as they are.

    On a GPU the calls are captured as CUDA graphs (``reduce-overhead``), which need fixed shapes and overwrite their
    output at the next call. On a CPU there is nothing to capture.

    Args:
        module: The network.
        device: Where it computes.
        static: Whether all its calls have the same few shapes, and need no gradients. False compiles again for other
            shapes, and captures nothing.

    Raises:
        DdilError: this machine cannot compile.
    """
    require_compiler(device.type)
    compiled: Any = module
    if not static:
        compiled.compile()
    elif device.type == "cuda":
        compiled.compile(mode="reduce-overhead", dynamic=False)
    else:
        compiled.compile(dynamic=False)


@cache
def require_compiler(device: str) -> None:
    """Refuse to compile on a machine that cannot, by a compilation of one sum.

    Raises:
        DdilError: there is no C++ compiler, or something else that compilation needs is missing.
    """
    import torch._inductor.config as inductor

    if device == "cpu":
        inductor.compile_threads = 1  # worker processes that start late on a busy machine can be waited for in vain
    try:
        torch.compile(torch.add)(torch.ones(2, device=device), 1)
    except Exception as error:  # torch and the compilers raise errors of their own
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DdilError(
            f"nothing can be compiled on this machine ({reason}); install a C++ compiler such as g++, with Python's "
            "headers, or leave out --compile"
        ) from error
