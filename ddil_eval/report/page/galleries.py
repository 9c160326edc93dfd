"""Galleries: the images of many prompts, side by side for each column, with orders such as "most changed first".

Three things in a results folder become galleries: strips (Figure 2, inverted prompts), kept images of systems
(``--save-images``) with the scores in ``features``, and whole figures of earlier versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddil_core.support.checksums import Damaged, require_checksum
from ddil_eval.report.page.pictures import Picture, embed, read_image, split
from ddil_eval.report.records import Direction, Record
from ddil_eval.report.strips import FOLDER, INDEX, read_strips

FIRST, TOP = 48, 8
"""How many prompts of a gallery are shown in their own order, and how many of each other order."""
BUDGET = 2_500_000
"""The most bytes of pictures on a page."""
SIDE = {"image": 192, "sheet": 1100}
"""The longer side in pixels to which an image of a prompt and a whole figure are made smaller."""
Loader = Callable[[], Sequence[Sequence[Image.Image]] | None]
"""Reads the images of one prompt, for each column; None if a file cannot be read."""


@dataclass(frozen=True)
class Prompted:
    """The images of one prompt: how to read them, and the scores of each metric by column."""

    id: str
    text: str
    load: Loader
    scores: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A prompt on the page: for each column, its pictures and its scores in print."""

    id: str
    prompt: str
    cells: tuple[tuple[tuple[Picture, ...], tuple[str, ...]], ...]


@dataclass(frozen=True)
class Gallery:
    """A gallery on the page.

    Attributes:
        title: The title.
        text: What it shows.
        columns: The names of the columns.
        rows: The prompts.
        orders: For each order: its name, and the places of its rows. The first order is that of the prompts.
        left_out: How many prompts the page does not show.
        sheet: The gallery is one of whole figures, each with a caption.
    """

    title: str
    text: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    orders: tuple[tuple[str, tuple[int, ...]], ...]
    left_out: int = 0
    sheet: bool = False


_TITLES = {
    "figure2": (
        "Figure 2: from the student alone to the teacher alone",
        "Each row is one prompt from the same noise. The teacher acts until the switch time, then the student.",
    ),
    "inverted": (
        "Inverted prompts",
        "The inverted image, and the first image that each system draws from the prompt that was found for it.",
    ),
}
"""The titles and texts of the folders of strips."""


def galleries(results: Path, records: Sequence[Record], order: Sequence[str] = ()) -> list[Gallery]:
    """Return the galleries of a results folder, with at most ``BUDGET`` bytes of pictures.

    Args:
        results: The results folder.
        records: Its records; they say which scores are means over prompts, and which values are better.
        order: The names of the systems in the order of their columns; others follow.
    """
    budget, found = [BUDGET], list[Gallery]()
    directions = _directions(records)
    pairs = [(str(of[0]), str(of[1])) for record in records if isinstance(of := record.cell.get("of"), list)]
    folders = [index.parent for index in sorted(results.rglob(f"{FOLDER}/*/{INDEX}"))]
    for folder in folders:
        title, text = _TITLES.get(folder.name, (folder.name, "One row for each prompt."))
        if [other.name for other in folders].count(folder.name) > 1:
            text += f" These are in {folder.relative_to(results).as_posix()}."
        for columns, prompts in _strips(folder):
            found.append(_gallery(title, text, columns, prompts, directions, pairs, budget))
    for columns, prompts in _kept(results, records, order):
        text = "Each row is one prompt from the same noise. A column is a system; its images differ in their seeds."
        found.append(_gallery("Systems side by side", text, columns, prompts, directions, pairs, budget))
    return [gallery for gallery in (*found, *_sheets(results, budget)) if gallery.rows or gallery.left_out]


def _strips(folder: Path) -> Iterator[tuple[tuple[str, ...], list[Prompted]]]:
    """Yield the columns and the prompts of a folder of strips; prompts with other columns come apart."""
    strips = read_strips(folder)
    for columns in dict.fromkeys(tuple(strip.columns) for strip in strips):

        def loader(file: str, count: int = len(columns)) -> Loader:
            def load() -> Sequence[Sequence[Image.Image]] | None:
                image = read_image(folder / file)
                parts = None if image is None else split(image, count)
                return None if parts is None else [[part] for part in parts]

            return load

        yield (
            columns,
            [
                Prompted(strip.id, strip.prompt, loader(strip.file), strip.scores)
                for strip in strips
                if tuple(strip.columns) == columns
            ],
        )


def _kept(
    results: Path, records: Sequence[Record], order: Sequence[str]
) -> Iterator[tuple[tuple[str, ...], list[Prompted]]]:
    """Yield the systems and the prompts of kept images. Systems on the same prompts and seed stand together."""
    together: dict[tuple[object, ...], list[_Kept]] = {}
    keys = list(_feature_keys(results))
    for path in sorted(results.rglob("images/*/made.json")):
        made, lines = _json(path), _lines(path.parent / "index.jsonl")
        if not isinstance(made, dict) or not lines:
            continue
        number = made.get("pictures_per_prompt", 1)
        same = (path.parent.parent, *(made.get(k) for k in ("prompt_ids_sha256", "captions_sha256", "seed")), number)
        name = next((key["name"] for _, key in keys if _is_made_as(key, made)), path.parent.name)
        together.setdefault(same, []).append((str(name), path.parent, made, lines))
    for (*_, number), systems in together.items():
        count = int(number) if isinstance(number, int) and number > 0 else 1
        systems.sort(key=lambda system: order.index(system[0]) if system[0] in order else len(order))
        scores = [_scores(made, name, keys, records) for name, _, made, _ in systems]
        length = min(len(lines) for *_, lines in systems) // count
        metrics = [metric for metric in scores[0] if all(len(one.get(metric, ())) >= length for one in scores)]
        yield (
            tuple(name for name, *_ in systems),
            [
                Prompted(
                    id=str(systems[0][3][row * count]["id"]).removesuffix("-0" if count > 1 else ""),
                    text=str(systems[0][3][row * count]["prompt"]),
                    load=_kept_loader([(place, ls[row * count : (row + 1) * count]) for _, place, _, ls in systems]),
                    scores={metric: [float(one[metric][row]) for one in scores] for metric in metrics},
                )
                for row in range(length)
            ],
        )


_Kept = tuple[str, Path, dict[str, Any], list[dict[str, Any]]]
"""A system's kept images: its name, their folder, how they were made, and the lines of their index."""


def _kept_loader(files: Sequence[tuple[Path, Sequence[Mapping[str, Any]]]]) -> Loader:
    def load() -> Sequence[Sequence[Image.Image]] | None:
        images = [[read_image(folder / str(line["file"])) for line in lines] for folder, lines in files]
        whole = [[image for image in column if image is not None] for column in images]
        return None if any(None in column for column in images) else whole

    return load


def _feature_keys(results: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the folders of features with their keys."""
    for path in sorted(results.rglob("features/*/key.json")):
        key = _json(path)
        if isinstance(key, dict) and isinstance(key.get("made"), dict) and isinstance(key.get("prompts"), dict):
            yield path.parent, {"name": path.parent.name} | key


def _is_made_as(key: Mapping[str, Any], made: Mapping[str, Any]) -> bool:
    """Whether features are those of kept images: both files say the same of the model, the sampling and the prompts."""
    own = {name: value for name, value in made.items() if name in key["made"]}
    return own == key["made"] and all(made.get(name) == value for name, value in key["prompts"].items())


def _scores(
    made: Mapping[str, Any], name: str, keys: Sequence[tuple[Path, dict[str, Any]]], records: Sequence[Record]
) -> dict[str, np.ndarray]:
    """Return the scores of each prompt, for the metrics of a system that are means of scores."""
    found: dict[str, np.ndarray] = {}
    measured = {
        metric: value
        for record in records
        if record.kind == "system" and name in (record.cell["name"], *record.systems)
        for metric, value in record.metrics.items()
        if value.kind == "mean" and value.network is not None
    }
    for folder, key in keys:
        if not _is_made_as(key, made):
            continue
        for metric, value in measured.items():
            path = folder / f"{(value.network or {}).get('name')}.npy"
            try:
                require_checksum(path, "the file of the scores", "delete it")
                scores = np.load(path, allow_pickle=False) if path.parent == folder else None
            except (Damaged, OSError, ValueError, EOFError):
                continue
            if scores is not None and scores.ndim == 2 and scores.shape[1] == 1 and np.isfinite(scores).all():
                found[metric] = scores[:, 0]
    return found


def _sheets(results: Path, budget: list[int]) -> Iterator[Gallery]:
    """Yield the figures of folders that hold no strips: Figure 2, and the figures of inverted prompts."""
    for name, pattern in {"figure2": "figure2.png", "inverted": "inverted/*.png"}.items():
        rows, left_out = list[Row](), 0
        for path in sorted(results.rglob(pattern)):
            root = path.parent.parent if name == "inverted" else path.parent
            if root.name == FOLDER or (root / FOLDER / name / INDEX).is_file():
                continue  # a strip, or a figure that strips show
            image = read_image(path) if budget[0] > 0 else None
            if image is None:
                left_out += 1
                continue
            shown = path.relative_to(results).as_posix()
            picture = embed(image, f"{_TITLES[name][0]}: {shown}. {_TITLES[name][1]}", SIDE["sheet"])
            budget[0] -= len(picture.source)
            rows.append(Row(path.stem, shown, (((picture,), ()),)))
        orders = (("in order", tuple(range(len(rows)))),)
        yield Gallery(*_TITLES[name], (), tuple(rows), orders, left_out, sheet=True)


def _gallery(
    title: str,
    text: str,
    columns: tuple[str, ...],
    prompts: Sequence[Prompted],
    directions: Mapping[str, Direction],
    pairs: Sequence[tuple[str, str]],
    budget: list[int],
) -> Gallery:
    """Choose the prompts to show, read their images, and number the rows of each order."""
    orders = {"in order": list(range(min(FIRST, len(prompts)))), **_orders(columns, prompts, directions, pairs)}
    wanted = sorted({place for places in orders.values() for place in places})
    rows, place_of = list[Row](), dict[int, int]()
    for place in wanted:
        prompted = prompts[place]
        images = prompted.load() if budget[0] > 0 else None
        if images is None:
            continue
        cells = []
        for c, (name, column) in enumerate(zip(columns, images, strict=True)):
            several = [f"{name}, image {n + 1}: " if len(column) > 1 else f"{name}: " for n in range(len(column))]
            pictures = tuple(
                embed(image, start + prompted.text, SIDE["image"]) for start, image in zip(several, column, strict=True)
            )
            budget[0] -= sum(len(picture.source) for picture in pictures)
            cells.append((pictures, tuple(_score(metric, scores[c]) for metric, scores in prompted.scores.items())))
        place_of[place] = len(rows)
        rows.append(Row(prompted.id, prompted.text, tuple(cells)))
    numbered = tuple((name, tuple(place_of[p] for p in places if p in place_of)) for name, places in orders.items())
    return Gallery(title, text, columns, tuple(rows), numbered, len(prompts) - len(rows))


def _orders(
    columns: Sequence[str],
    prompts: Sequence[Prompted],
    directions: Mapping[str, Direction],
    pairs: Sequence[tuple[str, str]],
) -> dict[str, list[int]]:
    """Return, by name, the prompts on which each column is worst, and on which the columns of a pair differ most.

    The pairs are the recorded differences. Without one between these columns, each is compared with the first.
    """
    orders: dict[str, list[int]] = {}
    places = {name: c for c, name in enumerate(columns)}
    for metric in dict.fromkeys(name for prompted in prompts for name in prompted.scores):
        table = np.array(
            [
                [np.nan if score is None else score for score in prompted.scores.get(metric, [None] * len(columns))]
                for prompted in prompts
            ],
            dtype=np.float64,
        )
        sign = 1 if directions.get(metric, "higher") == "higher" else -1
        scored = [name for name, c in places.items() if np.isfinite(table[:, c]).all()]
        recorded = [pair for pair in dict.fromkeys(pairs) if set(pair) <= set(scored)]
        for name in scored:
            orders[f"worst {metric}: {name}"] = _top(sign * table[:, places[name]])
        for a, b in recorded or [(name, scored[0]) for name in scored[1:]]:
            orders[f"most changed {metric}: {a} − {b}"] = _top(-np.abs(table[:, places[a]] - table[:, places[b]]))
    return orders


def _top(scores: np.ndarray) -> list[int]:
    return [int(place) for place in np.argsort(scores, kind="stable")[:TOP]]


def _score(metric: str, score: float | None) -> str:
    return "" if score is None else f"{metric} {score:.3g}"


def _directions(records: Sequence[Record]) -> dict[str, Direction]:
    return {name: metric.direction for record in records for name, metric in record.metrics.items()}


def _json(path: Path) -> object:
    """Return the content of a JSON file; None where it cannot be read."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of an index of kept images; nothing if a line is damaged or names a file elsewhere."""
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        plain = all(Path(str(line["file"])).name == line["file"] for line in lines)
        whole = plain and all({"id", "prompt"} <= line.keys() for line in lines)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []
    return lines if whole else []
