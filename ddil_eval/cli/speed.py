"""The speed of this machine: ``python -m ddil_eval.cli.speed`` prints its device and how fast that draws.

It is measured in a process of its own, whose memory is free again while the commands of a recreation run.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass

from ddil_core.support.errors import DdilError
from ddil_core.support.progress import note, quiet


@dataclass(frozen=True)
class Machine:
    """What the commands of a recreation run on.

    Attributes:
        device: The device: a GPU where there is one, or "cpu".
        speed: How many images of 4 steps it draws in a second with ``shapes-flow``, on one core or the GPU.
        cores: The number of cores.
    """

    device: str
    speed: float
    cores: int


def this_machine(cores: int) -> Machine:
    """Measure this machine, which takes some seconds.

    Args:
        cores: The number of cores that this process may use.

    Raises:
        DdilError: its speed cannot be measured.
    """
    note("measuring the speed of this machine")
    command = [sys.executable, "-m", "ddil_eval.cli.speed"]
    # A session of its own: Ctrl-C in the terminal reaches this process alone, which then ends the other.
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, start_new_session=True, check=False)
    if done.returncode != 0:
        raise DdilError("the speed of this machine cannot be measured, as the lines above say; mend their cause")
    device, speed = done.stdout.split()[-2:]
    return Machine(device, float(speed), cores)


def measure_speed(device: str, seconds: float = 3.0) -> float:
    """Return how many images of 4 steps the flow teacher of the shapes world draws in a second, on one core or a GPU.

    Args:
        device: The device.
        seconds: How long to measure.
    """
    import torch

    import ddil_core

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with quiet():
            teacher = ddil_core.load_model("shapes-flow", device)
            prompts = ["a small red circle on a grey background"] * 16
            ddil_core.sample(teacher, prompts, steps=4)  # the first batch is slower
            started, best = time.monotonic(), float("inf")
            while time.monotonic() - started < seconds:
                begun = time.monotonic()
                ddil_core.sample(teacher, prompts, steps=4)
                best = min(best, time.monotonic() - begun)
            return len(prompts) / best
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    from ddil_core.support.devices import choose_device
    from ddil_eval.cli import options

    options.quiet_libraries()
    device = choose_device()
    print(device, measure_speed(device))
