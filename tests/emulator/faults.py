"""What the emulator raises."""


class Fault(Exception):
    """The code does what the machine does not define, or what stops it for ever."""
