"""The collector leaves out what a command imports, and is as it was where JAX is imported already."""

import gc
import subprocess
import sys

from jaxinfer.cli.lasting_imports import lasting_imports

PROGRAM = """import gc
from jaxinfer.cli.lasting_imports import lasting_imports
before = gc.get_freeze_count()
with lasting_imports():
    assert not gc.isenabled()
    import jax
assert gc.isenabled() and gc.get_freeze_count() > before + 10_000
"""


def test_lasting_imports_leave_the_collector_on_and_their_objects_out():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True)


def test_lasting_imports_change_nothing_once_jax_is_there():
    import jax  # noqa: F401

    before = gc.get_freeze_count()
    with lasting_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
