"""The errors that a user, not a programmer, is meant to read."""


class UserError(Exception):
    """Something the user gave cannot work. Commands print its one sentence and exit with status 2."""

    def __str__(self) -> str:
        """On one line, whatever the names and values in it hold: what cannot be printed is escaped."""
        return printable(super().__str__())


class AbsentError(UserError):
    """An image that was asked for cannot be read, and no other stands for it."""


class NonFiniteError(Exception):
    """A loss term became NaN or infinite. Commands print its one sentence and exit with status 1."""


class CollapsedError(Exception):
    """The latents carry nothing, and the run was told to stop then. Commands print its one sentence and exit with status 1."""


class RankLostError(Exception):
    """Another rank has ended, or does not come, or is silent. Commands exit with its status.

    Args:
        words: One sentence.
        speaks: Whether this rank is the one to print it.
        status: 1, or that with which the other rank ended.
        explained: Whether the other rank has said why.
    """

    def __init__(self, words: str, speaks: bool, status: int = 1, explained: bool = False) -> None:
        super().__init__(words)
        self.speaks, self.status, self.explained = speaks, status, explained


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGUSR1 came. Commands say how to go on and exit with its status, 130, 143 or 138.

    Args:
        number: Of the signal.
        kept: What of the run is kept, in words; empty if that is not known here.
    """

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(kept)
        self.status, self.kept = 128 + number, kept


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line, for a sentence of ours; its type where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def printable(text: object) -> str:
    """Text for a terminal, in one line: names out of files may hold what moves the cursor or changes colours, which is escaped."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))
