"""The one kind of error that is told to the user in a sentence, without a stack trace."""


class UserError(Exception):
    """A mistake in what a run was given: names the file, key or value, the rule and the mend."""
