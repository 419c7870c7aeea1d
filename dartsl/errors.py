"""The kind of error that a person can mend: it ends in one sentence, not in a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a command, a config or a file; the message names the value and the mend.

    `run.py` prints the message alone and exits with status 1.
    """


def first_line(error: Exception) -> str:
    """What an error says first, or its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unknown(kind: str, value: object, choices: Iterable[str]) -> UserError:
    """The error for a misspelt name: names the value, the nearest choice and all choices.

    Args:
        kind: what is named, e.g. "primitive".
        value: the name that does not exist.
        choices: the names that do.
    """
    names = sorted(choices)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"Unknown {kind} {value!r}.{hint} Choices: {', '.join(names) or 'none'}.")
