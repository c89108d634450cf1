"""The error a user can act on."""


class UserError(ValueError):
    """Bad input: one line that names the field or file and says what to do.

    The command line prints it without a traceback and exits with code 2.
    """
