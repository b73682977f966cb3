"""Folders of images: which files are images, which folders are classes, and what is held out for validation."""

import os
from pathlib import Path

import numpy as np

from runtime.errors import InputError
from runtime.ranks import say

# In either case. Of an animation the first frame is taken. What Pillow reads by other programs is left alone (.eps).
EXTENSIONS = tuple(".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp .gif".split())


def class_folders(root: Path, split: str, level: int = 1) -> tuple[list[str], list[list[str]]]:
    """Class names, sorted, and the images of each as sorted paths relative to `root`.

    Either train/ and val/ hold the same class folders, or there is no val/: then the class folders lie in train/ or
    in `root` itself, and the second of every ten images of a class (by sorted path) is held out as "val"; "train" is
    the rest. Where folders lie in folders, those at `level` are the classes. Where there are none, the images have no
    labels: no class names, and one list with every image below train/ and val/, or below `root`.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give one that holds images, or a folder of images for each class")
    train, val = root / "train", root / "val"
    if subfolders(val) and not subfolders(train):
        raise InputError(f"{root}: val/ holds class folders but train/ does not; both need the same")
    base = train if subfolders(train) else root  # a class may be called "train"
    if base == root and set(subfolders(root)) <= {"train", "val"}:
        if level > 1:
            raise InputError(f"{root}: holds no class folders; leave out --class-level")
        if train.is_dir() and val.is_dir():
            return [], [image_files(root, root / split)]
        return [], held_out(root, [image_files(root, train if train.is_dir() else root)], split)
    classes = folders_at(base, level, aloud=split == "train")
    if base == root or not val.is_dir():
        paths = held_out(root, [image_files(root, base / name) for name in classes], split)
    elif subfolders(val):
        if (here := set(classes)) != (there := set(folders_at(val, level))):
            only = [", ".join(sorted(names)[:3]) or "none" for names in (here - there, there - here)]
            raise InputError(f"{root}: class folders differ, only in train/: {only[0]}, only in val/: {only[1]}")
        paths = [image_files(root, root / split / name) for name in classes]
    else:
        paths = flat_val(root, classes)  # for both splits, so that what is wrong with it shows at once
        paths = paths if split == "val" else [image_files(root, train / name) for name in classes]
    below = {path.rpartition("/")[0] for of_class in paths for path in of_class[:1] + of_class[-1:]}
    if split == "train" and level == 1 and len(below) > len(classes):
        some = ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")
        what = f"the {len(classes)} folders at the top ({some}) became the classes, though they hold folders"
        say(f"{root}: {what}; --class-level 2 takes those")
    return classes, paths


def held_out(root: Path, paths: list[list[str]], split: str) -> list[list[str]]:
    """Of every ten images of each list the second as "val", the rest as "train"."""
    paths = [[p for i, p in enumerate(of_class) if (i % 10 == 1) == (split == "val")] for of_class in paths]
    if not any(paths):
        raise InputError(f"{root}: one image, or one per class, leaves none to hold out; add images, or a folder val/")
    return paths


def subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def folders_at(base: Path, level: int, aloud: bool = False) -> list[str]:
    """The folders `level` steps below `base`, by their paths from there; `aloud` says how many images lie above."""
    if level < 1:
        raise InputError(f"class level {level}: must be at least 1, which is the folders at the top")
    folders, loose = [""], 0
    for depth in range(level):
        if aloud:
            loose += sum(is_image(entry.name) for folder in folders for entry in os.scandir(base / folder))
        folders = [os.path.join(folder, name) for folder in folders for name in subfolders(base / folder)]
        if not folders:
            raise InputError(f"{base}: holds no folders at level {depth + 1}; give a --class-level up to {depth}")
    if loose:
        say(f"{base}: {loose} images that lie beside or above the class folders have no label and are left out")
    return sorted(folders)


def is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and name[0] != "."


def image_files(root: Path, folder: Path) -> list[str]:
    """Sorted paths, relative to `root`, of all images below `folder`; hidden files are passed over."""
    paths = []
    for base, _, names in os.walk(folder, followlinks=True):
        inside = os.path.relpath(base, root)  # once a folder: a million images wait for each step here
        inside = "" if inside == "." else f"{inside}/"
        paths += [inside + name for name in names if is_image(name)]
    if not paths:
        raise InputError(f"{folder}: holds no images ({' '.join(EXTENSIONS)}); add some, or remove the folder")
    return sorted(paths)


def flat_val(root: Path, classes: list[str]) -> list[list[str]]:
    """ImageNet's val/ as it is unpacked, without class folders: the images of each class, by a list that lies near.

    That is Kaggle's LOC_val_solution.csv, or the ground truth of the development kit with its map_clsloc.txt or
    meta.mat: in `root`, up to three folders above it, or in a development kit in one of these.
    """
    kits = ("", "ILSVRC2012_devkit_t12/data", "devkit/data")
    near = [place / kit for place in (root, *list(root.absolute().parents)[:3]) for kit in kits]
    names = "LOC_val_solution.csv ILSVRC2012_validation_ground_truth.txt map_clsloc.txt meta.mat".split()
    solution, truth, *maps = (next((p / n for p in near if (p / n).is_file()), None) for n in names)
    if not solution and not (truth and any(maps)):
        what = "put LOC_val_solution.csv (Kaggle's) or ILSVRC2012_devkit_t12/ (image-net.org's) beside val/"
        what = f"holds no class folders, nor is a list of its labels near; {what}"
        raise InputError(f"{root}/val: {what}, or sort the images into class folders")
    try:
        if solution:  # ImageId,class box …
            rows = [line.split(",") for line in solution.read_text().splitlines()[1:] if line]
            labels = {image: found.split()[0] for image, found, *_ in rows}
        else:
            synsets = read_synsets(*maps)
            numbers = enumerate(truth.read_text().split(), 1)
            labels = {f"ILSVRC2012_val_{i:08}": synsets[int(number)] for i, number in numbers}
    except ImportError:
        what = "is read with scipy, which is not installed; install it, or put LOC_val_solution.csv beside val/"
        raise InputError(f"{maps[1]}: {what}") from None
    except Exception:  # scipy's reader raises every kind there is
        raise InputError(f"{solution or truth}: is not the list of labels that it should be; fetch it again") from None
    of_class = {name: [] for name in classes}
    for path in image_files(root, root / "val"):
        if (label := labels.get(Path(path).stem)) not in of_class:
            what = f"of class {label}, which train/ does not have" if label else f"not in {(solution or truth).name}"
            raise InputError(f"{root}/{path}: {what}; remove it, or mend the other")
        of_class[label].append(path)
    if empty := [name for name, paths in of_class.items() if not paths]:
        raise InputError(f"{root}/val: holds no image of class {empty[0]}, which train/ has; both need the same")
    return list(of_class.values())


def read_synsets(text: Path | None, matlab: Path | None) -> dict[int, str]:
    """The development kit's numbers → WordNet's names of classes, from map_clsloc.txt, else from meta.mat."""
    if text:
        return {int(number): name for name, number, *_ in map(str.split, text.read_text().splitlines())}
    from scipy.io import loadmat

    return {int(row[0]): str(row[1]) for row in np.atleast_1d(loadmat(matlab, squeeze_me=True)["synsets"])}
