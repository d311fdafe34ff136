"""Errors that a user can fix. Any other exception is a bug and shows its traceback."""


class InputError(ValueError):
    """Invalid input: a recipe, a template, a data file or an option. The message names the place."""


class ModelError(RuntimeError):
    """An external failure, such as a model that cannot be loaded. The message says what was tried and what to do."""
