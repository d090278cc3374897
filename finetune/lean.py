"""Start quickly: import only what a run uses, with the garbage collector paused meanwhile.

transformers, TRL, PEFT and Accelerate import optional packages because they are installed, not because a run uses them:
with all of them present that is a third of the processor time from the command to the first step. They ask
`importlib.util.find_spec` first, and None in `sys.modules` answers that a package is not there.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Collection, Iterable

# Imported unasked by the libraries named in brackets, where installed.
TRACKERS = ("comet_ml", "mlflow", "tensorboard", "trackio", "wandb", "weave")  # TRL, Accelerate
MEDIA = ("nibabel", "soundfile", "soxr", "torchaudio", "torchcodec", "torchvision")  # transformers, datasets
QUANTIZERS = ("aqlm", "bitsandbytes", "eetq", "hqq", "torchao", "transformer_engine")  # PEFT, transformers
SCIENCE = ("scipy", "sklearn")  # transformers: the losses of object detection, and assisted generation
SHARDING = ("deepspeed",)  # transformers, Accelerate, when a model is saved
OPTIONAL = frozenset((*TRACKERS, *MEDIA, *QUANTIZERS, *SCIENCE, *SHARDING))


def hide(unless: Collection[str]) -> None:
    """Make OPTIONAL packages look as if they were not installed, for the rest of this process.

    Only a process that belongs to one command may do this, and only before transformers is imported: the answers to
    "is it installed?" are remembered there. Once it is imported, nothing is hidden. A package that is imported already
    stays.

    Args:
        unless: packages that the command uses. `finetune.run.needs` says which.
    """
    if "transformers" in sys.modules:
        return
    for name in OPTIONAL.difference(unless):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def pause_collector() -> None:
    """Stop looking for cycles: among the million objects that imports make there are none to free."""
    gc.disable()


def import_all(modules: Iterable[str]) -> None:
    """Import modules, and let the collector run again, but never look at what was there before.

    Only for a process of one command: cycles that exist now are not freed before it ends.
    """
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # before it runs again, or else its first round would look at everything
    gc.enable()
