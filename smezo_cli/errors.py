"""The one error class for what a user did or the machine lacks."""

from smezo_cli.redaction import sentence


class UserError(Exception):
    """One clear sentence for the user: the key, what was got, what is allowed, what mends it.

    The command line prints it without a traceback and exits with code 2. Secrets are redacted, and
    line ends and other controls that came with a file's content do not reach the terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(sentence(message))
