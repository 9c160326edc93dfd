"""What a figure was measured on: device, threads, versions. One line above every CSV file."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from ddil_core.support.environment import cores

PACKAGES = ("ddil", "torch", "diffusers", "numpy")


def device() -> str:
    """Return the name of the GPU that torch uses, or else of the processor, with its cores and torch's threads."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    threads = "" if torch is None else f", threads: {torch.get_num_threads()}"
    return f"{processor()}, cores: {cores()}{threads}"


def processor() -> str:
    """Return the name of the processor. On Linux, only /proc knows it."""
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def header(packages: Iterable[str] = ()) -> str:
    """Return one line: the device, and the versions of Python, of ddil's own packages and of further ``packages``."""
    versions = [f"python {platform.python_version()}"]
    for name in dict.fromkeys((*PACKAGES, *packages)):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} (not installed)")
    return f"{device()}; {', '.join(versions)}"
