"""The exceptions that the command line turns into one line on stderr."""


class InputError(Exception):
    """The user gave something that cannot work; the message names it, what it was and what was wanted, in one line."""


class DivergedError(Exception):
    """The training loss is no longer a number."""
