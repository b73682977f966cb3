"""The one kind of error that a user sees as a line."""


class InputError(ValueError):
    """What a user gave cannot work. The message is one line: the thing, what is wrong, what would be right."""
