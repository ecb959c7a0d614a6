"""The errors that are told to the user in a sentence, without a stack trace."""


class UserError(Exception):
    """A mistake in what a run was given: names the file, key or value, the rule and the mend."""


class BadExample(UserError):
    """One example of a data set that cannot be used, such as a corrupt picture; names its file."""
