"""The one exception that is meant for the person at the keyboard."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What a user gave cannot be used.

    The message is one sentence for a person: what was wrong, where, what is allowed, what to do.
    The command line prints it without a traceback and exits with status 2.
    """


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'depth'?)`` for the closest of the allowed words, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""
