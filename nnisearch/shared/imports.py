"""Makes `import nni` fast, in every process of this package."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_pandas() -> Iterator[None]:
    """Hide pandas while the block imports NNI.

    NNI's json_tricks imports pandas if it is installed, which doubles the time of `import nni`.
    """
    hidden = sys.modules.setdefault("pandas", None)  # importing a module that is None fails
    try:
        yield
    finally:
        if hidden is None:
            del sys.modules["pandas"]
