"""The one kind of error that a user sees as a line."""

import importlib


def printable(line: str) -> str:
    """The line with control characters and line ends escaped: a file's name may hold them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class InputError(ValueError):
    """What a user gave cannot work. The message is one line: the thing, what is wrong, what would be right."""

    def __str__(self) -> str:
        return printable(super().__str__())


def library(name: str, extra: str, what: str):
    """A module of a library that not everybody has installed: `what` needs it, and an extra of ours brings it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        its = name.split(".")[0]
        raise InputError(f'{its}: not installed, and {what} needs it; pip install ".[{extra}]"') from None
