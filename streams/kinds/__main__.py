"""`python -m streams.kinds`: compile every kernel into numba's cache, so that the first start waits for none.

Run by the image build and by `make install`.
"""

from __future__ import annotations

import importlib.util
import sys

from streams.warm import warm_engine


def main() -> int:
    """Compile; print what was done."""
    warm_engine()
    done = ["engine"]
    if importlib.util.find_spec("streams.decode") is not None:
        from streams.decode import warm  # noqa: PLC0415  it compiles on import

        warm()
        done.append("decode")
    sys.stdout.write(f"kernels compiled: {', '.join(done)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
