"""The one error that a file or its content can cause."""


class ConversionError(Exception):
    """One sentence for the user: what is wrong with which file, field and value."""
