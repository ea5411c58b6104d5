"""Exceptions that tell lorakit what is wrong, in one line. Any other one is a failure of the plugin."""


class Malformed(Exception):
    """A file breaks the rules of its format."""


class Unsupported(Exception):
    """A file has what the plugin does not read, or was to hold what the format has no place for."""


class Limit(Exception):
    """A file is larger, or holds more, than the plugin is willing to read."""


class NonFinite(Exception):
    """A value to encode is not finite and may not be so. index is that of the element in the weight."""

    def __init__(self, index: int, what: str = "NaN or infinity"):
        super().__init__(f"element {index} is {what}")
        self.index = index
        self.what = what
