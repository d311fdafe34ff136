"""The two kinds of failure that a user can do something about. Everything else is a bug, and shows its traceback."""


class InputError(ValueError):
    """Something wrong with what the user gave: a recipe, a template, a data file, an option. The message says where."""


class ModelError(RuntimeError):
    """A model that cannot be had or loaded. The message says what was tried, and what to do."""
