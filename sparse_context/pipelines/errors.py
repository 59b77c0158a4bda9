"""What a call of an engine raises that is no bad input, which is a ValueError."""


class Cancelled(Exception):
    """A call was cancelled. The pipeline is as usable as before."""


class GenerationError(RuntimeError):
    """The pipeline failed in the middle of a call, in one sentence: memory that ran out, parts that do not belong
    together, settings of another model, or a defect. What it raised itself is the `__cause__`."""


class TooLargeError(GenerationError):
    """A model does not fit into the memory of its device."""
