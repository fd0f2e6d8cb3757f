"""Errors that a user can fix: the front door (cli.py) prints them as one line."""


class UserError(Exception):
    """A problem that the user can solve, not a fault of the code.

    The message is one line that names the file or key, the cause, and what to do. Scripts print it
    and end with status 2. Subclasses name its area: ConfigError, StoreError, CheckpointError, ...
    """
