"""The reference of protocols, docs/protocols.md: ``python -m ddil_eval.cli.protocol_reference [--check]``.

The page is made from the classes of the configurations: the names, types and defaults of their fields, and the
meanings under ``Attributes`` in their docstrings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from ddil_core.support.keys import Key, keys
from ddil_eval.cli.pages import DOCS, page_command, wrapped

HEAD = """<!-- Written by `make docs` from the configurations; edit the docstrings of their classes instead. -->

# Keys of protocols and recipes

A protocol is a YAML file. Unknown keys are refused, and a key without a default must be given. `--set KEY=VALUE`
replaces a key of the protocol; dots go deeper, as in `--set ddil.uses=2` and `--set stages.0.updates=3000`. The value
is YAML: `--set 'metrics=[fid, clip_score]'`, `--set ddil=null`. `--print-protocol` writes the protocol that a command
would use, with a comment for each key, and does nothing else:

```
ddil distill --method lcm --print-protocol > mine.yaml
```

No count is above 100,000,000. `null` stands for "none" or "the default that the text names". `ddil: {}` and
`watch: {}` are sections with all their defaults.
"""


def render() -> str:
    """Return the reference as Markdown: a list of keys for each kind of file, and for each of its sections."""
    from ddil_core.distillation.config import MethodConfig
    from ddil_core.distillation.methods import METHODS
    from ddil_core.inversion.inverters import INVERTERS
    from ddil_core.models.sampling import SystemFile
    from ddil_core.models.system_specs import SystemSpec
    from ddil_eval.cli.recreation import RecreationConfig
    from ddil_eval.experiments.experiments import EXPERIMENTS
    from ddil_eval.features.recipes import Recipe
    from ddil_eval.study.config import StudyConfig

    shared = keys(MethodConfig)
    parts = [HEAD, "\n## Distillation\n\nFor `ddil distill --protocol FILE`. The key `method` chooses the method.\n"]
    parts += _keys("Every method", [key for key in shared if key.name != "method"])
    for method in METHODS.values():
        own = [key for key in keys(method.config) if key not in shared]
        parts += _keys(f"Method `{method.name}`: {method.title}", own)
    parts += [
        "\n## Evaluation\n\nFor `ddil eval run FILE`, and for `--protocol FILE` of the other commands of `ddil eval`.\n"
    ]
    for experiment in EXPERIMENTS.values():
        parts += _keys(f"Experiment `{experiment.name}`: {experiment.title}", keys(experiment.config))
    for inverter in INVERTERS.values():
        parts += _keys(f"Inverter `{inverter.name}`: {inverter.title}", keys(inverter.settings))
    parts += ["\n## Studies\n\nFor `ddil study FILE`.\n"]
    parts += _keys("A study", keys(StudyConfig))
    parts += ["\n## Recreations\n\nFor `ddil recreate FILE`.\n"]
    parts += _keys("A recreation", keys(RecreationConfig))
    parts += ["\n## Recipes, systems and `ddil.json`\n"]
    parts += _keys("A recipe, in `recipes.yaml` or in a file for `--recipe`", keys(Recipe))
    parts += _keys("A system, in `systems.yaml`", keys(SystemSpec))
    parts += _keys("`ddil.json` beside a pipeline", keys(SystemFile))
    return "".join(parts)


def _keys(title: str, listed: Sequence[Key], place: str = "") -> Iterator[str]:
    """Yield the list of keys of a configuration, and of each of its sections. ``place`` leads to a section."""
    yield f"\n### {title}\n\n"
    yield from (_item(key, place) for key in listed)
    seen: dict[object, str] = {}
    for key in listed:
        if key.section is not None and seen.setdefault(key.section, key.name) == key.name:
            named = key.takes.startswith("a mapping") and not key.takes.startswith("a mapping of the keys")
            inner = f"{place}{key.name}" + ".0" * key.takes.startswith("a list") + ".NAME" * named
            yield from _keys(f"Section `{inner}`", keys(key.section), f"{inner}.")


def _item(key: Key, place: str) -> str:
    """Return a key as an item of a list: what it takes, its default, and its meaning."""
    default = "required" if key.required else f"default `{json.dumps(key.default, ensure_ascii=False)}`"
    text = f"- `{place}{key.name}` ({default}): {key.meaning.replace('``', '`')} It takes {key.takes}."
    return wrapped(text)


reference = page_command(
    DOCS / "protocols.md", render, "Write the reference of protocols, or check that it is up to date."
)

if __name__ == "__main__":
    reference(prog_name="python -m ddil_eval.cli.protocol_reference")
