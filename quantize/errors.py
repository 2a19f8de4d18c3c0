"""The one exception that the command line turns into one line."""


class QuantizeError(RuntimeError):
    """Something the user can mend: a model without linear layers, too little text, an impossible recipe."""
