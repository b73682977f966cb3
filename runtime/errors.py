"""The one kind of error that a user sees as a line."""


def printable(line: str) -> str:
    """The line with control characters and line ends escaped: a file's name may hold them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class InputError(ValueError):
    """What a user gave cannot work. The message is one line: the thing, what is wrong, what would be right."""

    def __str__(self) -> str:
        return printable(super().__str__())
