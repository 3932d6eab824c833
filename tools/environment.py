"""Print this Python's path if it has what the demo and the tests import; else fail.

Used by the Makefile to leave a machine that is already set up (a GPU image) as it is.
"""

import sys
from importlib.metadata import PackageNotFoundError, version

NEEDED = {
    "jax": (0, 11, 2),
    "numpy": (),
    "jaxtyping": (),
    "safetensors": (),
    "rich": (),
    "matplotlib": (),
    "optax": (),
    "pytest": (),
    "pytest-xdist": (),
    "hypothesis": (),
}


def missing() -> list[str]:
    """What this Python lacks, each with the least version that serves."""
    found = []
    if sys.version_info < (3, 12):  # noqa: UP036 (any Python may be asked)
        found.append("Python 3.12")
    for name, least in NEEDED.items():
        try:
            numbers = tuple(int(part) for part in version(name).split(".")[:3] if part.isdigit())
        except PackageNotFoundError:
            numbers = (-1,)
        if numbers < least or numbers == (-1,):
            found.append(f"{name} {'.'.join(map(str, least))}".strip())
    return found


if __name__ == "__main__":
    lacking = missing()
    if lacking:
        sys.exit(f"{sys.executable} lacks {', '.join(lacking)}")
    sys.stdout.write(sys.executable + "\n")
