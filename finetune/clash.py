"""Refuses to run beside the unrelated PyPI project `finetune`, which installs an import package of the same name.

Whichever of the two was installed last has overwritten files of the other, so neither can be trusted. Ours is the
distribution `finetune-recipes`; this looks for one called exactly `finetune`.
"""

from __future__ import annotations

import importlib.metadata

from finetune.errors import EnvironmentFault

NAMESAKE = "finetune"


def refuse_namesake() -> None:
    """Stop when the other project is installed. Reads folder names only, so it takes milliseconds.

    Raises:
        EnvironmentFault: it is installed; the message holds the two commands that mend it.
    """
    try:
        found = importlib.metadata.distribution(NAMESAKE)
    except importlib.metadata.PackageNotFoundError:
        return
    place = found.locate_file("")
    raise EnvironmentFault(
        f"another project called {NAMESAKE!r} is installed in {place}; it and this one (finetune-recipes) both own the "
        f"import name {NAMESAKE!r} and have overwritten each other's files. Run these two commands:\n"
        f"  python -m pip uninstall -y {NAMESAKE}\n"
        "  python -m pip install --force-reinstall --no-deps finetune-recipes\n"
        "(from a clone, the second is: python -m pip install --no-deps -e .)"
    )
