"""The errors that a user, not a programmer, is meant to read."""


class UserError(Exception):
    """Something the user gave cannot work. Commands print its one sentence and exit with status 2."""


class NonFiniteError(Exception):
    """A loss term became NaN or infinite. Commands print its one sentence and exit with status 1."""


class CollapsedError(Exception):
    """The latents carry nothing, and the run was told to stop then. Commands print its one sentence and exit with status 1."""
