"""Checks of single settings, whose errors name the setting, what it may be and what was given.

Owns: which values count as an int, a float or a bool (numpy's numbers are accepted, a bool is never a number).
Does not know: which settings there are.
"""

from __future__ import annotations

import math
import numbers


def require_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """The value as a Python int; refuses bools and anything but an integer (numpy's included) within [low, high].

    Raises:
      TypeError: value is not an integer.
      ValueError: value lies outside the range; the message gives name, range and value.
    """
    allowed = f">= {low}" if high is None else f"in {low}..{high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int {allowed}, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def require_float(name: str, value: object, allowed: str, low: float, high: float, *, open_low: bool = False) -> float:
    """The value as a Python float; refuses bools and anything but a finite number (numpy's included) in the range.

    Args:
      name: of the setting, for messages.
      value: what the user gave.
      allowed: the range in words, for messages.
      low, high: the range, both ends included.
      open_low: whether low itself is outside the range.

    Raises:
      TypeError: value is not a number.
      ValueError: value lies outside the range or is not finite; the message gives name, range and value.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number {allowed}, got {value!r} of type {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high or (open_low and number == low):
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return number


def require_bool(name: str, value: object) -> None:
    """Refuses anything but True or False.

    Raises:
      TypeError: value is not a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuses a value outside a closed list of words.

    Raises:
      ValueError: value is not one of choices; the message lists them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
