"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A user's mistake: one line that names the value and the remedy.

    The programs print it without a traceback and exit with status 2.
    """
