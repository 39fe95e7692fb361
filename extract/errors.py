"""The one error that this project raises for input a user can mend."""


class BadInput(ValueError):
    """A setting or file that cannot be used. The message names the setting, its value and the remedy."""
