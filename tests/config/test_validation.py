"""The checks of single settings accept what they should; how they refuse is seen in the tests of the settings."""

import numpy as np

from jaxinfer.config.validation import require_bool, require_choice, require_float, require_int


def test_require_helpers_valid_values_pass() -> None:
    assert require_int("a", np.int8(-3), -3, 3) == -3 and type(require_int("a", np.int8(0), 0)) is int
    assert require_float("a", 2, "in [1, 2]", 1, 2) == 2.0 and type(require_float("a", 2, "", 1, 2)) is float
    require_bool("a", False)
    require_choice("a", "x", ("x", "y"))
