"""Image sets of the Hugging Face hub, and parquet files on disk: the `datasets` library reads them, row by row."""

import io
from itertools import chain
from pathlib import Path

from inputs.image_files import Files, held_out
from runtime.errors import InputError
from runtime.ranks import say_once

PREFIX = "hf:"
VALIDATION = ("validation", "valid", "val", "dev", "test")  # as splits are called, the most likely first
LABEL = ("label", "labels", "class", "target", "category")  # as columns of labels are called that are not declared so


class Rows(Files):
    """The images that some rows of a table have in one column; `title` stands in messages."""

    def __init__(self, title: str, table, column: str, rows: list[int]):
        super().__init__(title, rows)
        self.table, self.column = table.select_columns([column]), column
        if kind(feature := table.features[column]) == "Image":  # which the library would decode itself
            self.table = self.table.cast_column(column, type(feature)(decode=False))

    def source(self, i: int):
        cell = self.table[int(self.paths[i])][self.column]
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
        return path if path and content is None else io.BytesIO(content)

    def name(self, i: int) -> str:
        return f"row {self.paths[i]}"

    def fingerprint(self) -> bytes:
        """What changes when any file does, as the library names its copy by their times, or which images are taken."""
        return repr((self.table.cache_files, self.column)).encode() + self.paths.tobytes()


def find(name: str, root: Path | None, splits, columns, split: str) -> tuple[list[str], Rows, list[int]]:
    """Names of classes, the images of all in their order, and how many each has; no names if there are no labels.

    name: hf: and a parquet file, a folder of them, or a set of the hub, with :CONFIGURATION where that has several.
    root: what the path of files is relative to, or the folder in which the library keeps sets of the hub.
    splits: the one to train on, by default "train", and the one to validate on, by default the first of VALIDATION that
        is there and is labelled if the other is. Where there is none, rows are held out, as of folders.
    columns: that of the images, and that of the labels if there are any; by default the only ones that may be these.
    split: "train" or "val".
    """
    tables = load(name, root)
    part, *val = splits or ["train" if "train" in tables else next(iter(tables))]
    if len(val) > 1 or not {part, *val} <= tables.keys():
        raise InputError(f"{name}: cannot take --split {' '.join(splits)}; give one or two of {', '.join(tables)}")
    image, label = choose(name, tables[part].features, columns)
    classes, of_class = by_class(f"{name}/{part}", tables[part], label)
    label = label if classes else None
    if split == "train" and not label and len(columns) != 1:  # one is that of images alone
        there = ", ".join(tables[part].features)
        say_once(f"{name}/{part}: no labels are found; if one of {there} holds them, give --columns IMAGE LABEL")
    usual = [other for other in VALIDATION if other in tables and other != part]
    val = val or [other for other in usual if not label or {*labels(tables[other], label)} - {None}]
    if val and split == "val":
        part = val[0]
        classes, of_class = by_class(f"{name}/{part}", tables[part], label, classes)
    if left := len(tables[part]) - sum(map(len, of_class)):
        say_once(f"{name}/{part}: {left} images have no label and are left out")
    of_class = of_class if val else held_out(name, of_class, split)
    if not any(of_class):
        raise InputError(f"{name}/{part}: holds no rows; give another --split of {', '.join(tables)}")
    return classes, Rows(f"{name}/{part}", tables[part], image, [*chain(*of_class)]), [*map(len, of_class)]


def load(name: str, root: Path | None):
    """The tables of all splits, by name."""
    try:
        import datasets  # two seconds that other sets need not wait
    except ImportError:
        raise InputError(f'{name}: needs the datasets library, which is not installed; pip install ".[hub]"') from None
    word = name.removeprefix(PREFIX)
    place = (root or Path()) / word
    advice = "give hf: and a parquet file, a folder of them, or OWNER/NAME[:CONFIGURATION] of the hub"
    try:
        if word.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=str(place))
        if place.is_dir():
            return datasets.load_dataset(str(place))
        owner_and_name, _, configuration = word.partition(":")
        return datasets.load_dataset(owner_and_name, configuration or None, cache_dir=root and str(root))
    except Exception as error:  # of many libraries
        if isinstance(error, datasets.exceptions.DatasetGenerationError):
            error = error.__cause__ or error  # which says more than "an error occurred"
        if isinstance(error, ConnectionError):
            advice = "connect, or give parquet files that lie here"
        elif isinstance(error, datasets.exceptions.DatasetNotFoundError):
            advice = "check the name; for a private or gated set, accept its terms on its page, then `hf auth login`"
        what = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise InputError(f"{name}: cannot be opened ({what}); {advice}") from error


def choose(name: str, features: dict, columns) -> tuple[str, str | None]:
    """The columns of the images and of their labels, if they have any: what is given, or what leaves no doubt."""
    kinds = {column: kind(feature) for column, feature in features.items()}
    there = ", ".join(f"{column} ({what})" for column, what in kinds.items())
    images = [column for column in kinds if kinds[column] == "Image"]
    images = images or [column for column in kinds if kinds[column] in ("binary", "large_binary", "bytes and path")]
    possible = [column for column in kinds if kinds[column].startswith(("ClassLabel", "int", "uint", "string", "bool"))]
    classes = [column for column in possible if kinds[column] == "ClassLabel"]
    classes = classes or [column for column in possible if column.lower() in LABEL]
    if columns:
        image, *label = columns
        if image not in images or not set(label) <= set(possible) or len(label) > 1:
            what = "the first must hold images, and the second, if there is one, labels"
            raise InputError(f"{name}: cannot take --columns {' '.join(columns)} of {there}; {what}")
        return image, label[0] if label else None
    if len(images) != 1:
        what = "several columns hold images; choose by" if images else "no column holds images; it has"
        raise InputError(f"{name}: {what} {'--columns IMAGE LABEL of ' if images else ''}{there}")
    if len(classes) > 1:
        raise InputError(f"{name}: several columns may be the labels; choose by --columns IMAGE LABEL of {there}")
    return images[0], classes[0] if classes else None


def kind(feature) -> str:
    """What a column holds, in a word: Image, ClassLabel, or the name of a plain type."""
    if isinstance(feature, dict):
        return "bytes and path" if "bytes" in feature else "struct"
    name = type(feature).__name__
    return feature.dtype if name == "Value" else name


def labels(table, column: str) -> list:
    """What the column holds in each row; None where it is empty or -1, which is how sets hide their tests' labels."""
    return [None if value == -1 else value for value in table.select_columns([column])[:][column]]


def by_class(title: str, table, label: str | None, known: list[str] = ()) -> tuple[list[str], list[list[int]]]:
    """Names of classes and the rows of each; if no row has a label, no names and all rows in one list.

    Classes have the order in which they are declared, or that of their values; `known` are those of other rows.
    """
    values = labels(table, label) if label else []
    found = sorted({*values} - {None})
    if not found:
        return [], [[*range(len(table))]]
    declared = getattr(table.features[label], "names", None)  # as ClassLabel has them
    classes = declared or known or [str(value) for value in found]
    of_class = {key: [] for key in (range(len(classes)) if declared else classes)}
    for row, value in enumerate(values):
        if value is None:
            continue
        if (key := value if declared else str(value)) not in of_class:
            raise InputError(f"{title}: row {row} has the label {value}, which none of the {len(classes)} classes has")
        of_class[key].append(row)
    return classes, [*of_class.values()]
