"""The one exception that is the user's to mend."""


class UserError(Exception):
    """A mistake in what the user gave; its text is one line: what was found, where, and what would be right."""
