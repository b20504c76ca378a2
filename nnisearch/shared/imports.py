"""How NNI is imported, for all processes of this package."""

import contextlib
import sys


@contextlib.contextmanager
def without_pandas():
    """Hide pandas while the block imports NNI.

    NNI's json_tricks loads pandas if it finds it, in case a table is reported: half of the time
    that `import nni` takes.
    """
    hidden = sys.modules.setdefault("pandas", None)  # a module that is None is not found
    try:
        yield
    finally:
        if hidden is None:
            del sys.modules["pandas"]
