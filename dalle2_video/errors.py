"""Errors that a user can mend: the front door (cli.py) prints them as one line."""


class UserError(Exception):
    """What a user did or has, and not a fault of the code, stands in the way.

    The message is one line that names the file or key, the cause, and what to do. Scripts print it
    and end with status 2. Subclasses say of what: ConfigError, StoreError, CheckpointError, ...
    """
