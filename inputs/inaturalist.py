"""iNaturalist, which CMAE transfers to (Table 5, the years 2017 to 2019): images by the JSON lists of a year."""

import json
import re
from pathlib import Path

from inputs.image_files import image_files
from runtime.errors import InputError
from runtime.ranks import say_once


def class_lists(root: Path, split: str) -> tuple[list[str], list[list[str]]]:
    """As `class_folders`, by the lists of one year in `root`, such as train2018.json and val2018.json.

    The images lie at the paths that the lists have. Or they lie as torchvision leaves them, without the first folder of
    these paths: in 2018/ (2021_train/ and 2021_valid/), or in `root`. Classes are in the order of their numbers.
    """
    years: dict[str, dict[str, Path]] = {}
    for path in sorted(root.glob("*.json")):
        if match := re.fullmatch(r"(train|val)(\d*)", path.stem):
            years.setdefault(match[2], {})[match[1]] = path
    if [set(lists) for lists in years.values()] != [{"train", "val"}]:
        there = ", ".join(path.name for lists in years.values() for path in lists.values()) or "no lists"
        raise InputError(
            f"{root}: holds {there}; give a folder with those of one year, train2018.json and val2018.json"
        )
    ((year, lists),) = years.items()
    names, (_, labels) = read(lists["train"])[0], read(lists[split])
    base, cut = layout(root, next(iter(labels)), year or dict(train="2021_train", val="2021_valid")[split])
    present, of_class = set(image_files(root, root / base)), {number: [] for number in names}
    for file, number in labels.items():
        if (path := placed(file, base, cut)) not in present:
            raise InputError(f"{root}/{path}: is missing; unpack the archive of the images again")
        if number is not None and number not in of_class:
            raise InputError(
                f"{lists[split]}: {file} is of category {number}, which {lists['train'].name} does not have"
            )
        of_class.get(number, []).append(path)
    if left := len(labels) - sum(map(len, of_class.values())):
        say_once(f"{lists[split]}: {left} images have no label and are left out")
    if left == len(labels):
        raise InputError(
            f"{lists[split]}: labels no image; fetch it again, or give --data {root} to train without labels"
        )
    return list(names.values()), [sorted(paths) for paths in of_class.values()]


def read(path: Path) -> tuple[dict[int, str], dict[str, int | None]]:
    """Number and name of each class, and the class of each image; None if it has none."""
    try:
        content = json.loads(path.read_text())
        names = {row["id"]: str(row.get("name", row["id"])) for row in content["categories"]}
        label_of = {row["image_id"]: row["category_id"] for row in content["annotations"]}
        labels = {row["file_name"]: label_of.get(row["id"]) for row in content["images"]}
        next(iter(labels)).split("/")
        return dict(sorted(names.items())), labels
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        raise InputError(f"{path}: is not a list of iNaturalist's images; fetch it again") from None


def layout(root: Path, file: str, folder: str) -> tuple[str, int]:
    """The folder below `root` that the images lie in, and how many folders of their listed paths are not there."""
    for base, cut in (("", 0), (folder, 1), ("", 1)):
        if (root / placed(file, base, cut)).is_file():
            return base, cut
    raise InputError(f"{root}/{file}: is missing; unpack the archive of the images there")


def placed(file: str, base: str, cut: int) -> str:
    return "/".join(filter(None, [base, *file.split("/", cut)[cut:]]))
