"""The one error of this package."""


class ModelError(Exception):
    """A model that cannot be served; the message is a sentence that names the file or tensor and says what to do."""
