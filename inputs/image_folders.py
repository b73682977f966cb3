"""Folders of images: which files are images, which folders are classes, and what is held out for validation."""

import os
from pathlib import Path

from runtime.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # in either case


def class_folders(root: Path, split: str) -> tuple[list[str], list[list[str]]]:
    """Class names, sorted, and the images of each as sorted paths relative to `root`.

    Either train/ and val/ hold the same class folders, or there is no val/: then the class folders lie in train/ or
    in `root` itself, and the second of every ten images of a class (by sorted path) is held out as "val"; "train" is
    the rest.
    """
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; give one that holds a folder of images for each class")
    train, val = root / "train", root / "val"
    if subfolders(val) and not subfolders(train):
        raise InputError(f"{root}: val/ holds class folders but train/ does not; both need the same")
    base = train if subfolders(train) else root  # a class may be called "train"
    classes = subfolders(base)
    if not classes:
        raise InputError(f"{root}: holds no class folders; give a folder that holds a folder of images for each class")
    if base == train and val.is_dir():
        here, there = set(classes), set(subfolders(val))
        if here != there:
            only = [", ".join(sorted(a - b)[:3]) or "none" for a, b in ((here, there), (there, here))]
            raise InputError(f"{root}: class folders differ, only in train/: {only[0]}, only in val/: {only[1]}")
        return classes, [image_files(root, root / split / name) for name in classes]
    paths = [image_files(root, base / name) for name in classes]
    paths = [[p for i, p in enumerate(of_class) if (i % 10 == 1) == (split == "val")] for of_class in paths]
    if not any(paths):
        raise InputError(f"{root}: one image per class leaves none to hold out; add images, or a folder val/")
    return classes, paths


def subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def image_files(root: Path, folder: Path) -> list[str]:
    """Sorted paths, relative to `root`, of all images below `folder`; hidden files are passed over."""
    paths = []
    for base, _, names in os.walk(folder, followlinks=True):
        inside = os.path.relpath(base, root)  # once a folder: a million images wait for each step here
        paths += [f"{inside}/{name}" for name in names if name.lower().endswith(EXTENSIONS) and name[0] != "."]
    if not paths:
        raise InputError(f"{folder}: holds no images ({' '.join(EXTENSIONS)}); add some, or remove the folder")
    return sorted(paths)
