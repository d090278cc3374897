"""The errors a user can cause, named by who can put them right, each with its exit code.

    FinetuneError                 shown as a message, never as a traceback
    ├── RecipeError          2    the recipe or the command line: edit the recipe
    ├── DataError            3    a data file or a row in it: mend the data
    ├── EnvironmentFault     4    the machine or an installed package
    │   └── HardwareError    4    memory, device, processes
    ├── ModelError           5    the base model or the adapter: refused before weights are spent
    ├── ExportError          5    what was written does not equal what was trained
    ├── RefusedError         5    would overwrite or mix up earlier work
    ├── DiskError           74    no space, no permission, a write that failed
    ├── StoppedError        75    stopped on request; the run can be resumed
    ├── NonFiniteError      76    loss or gradient became NaN or infinite
    └── HangError           77    a rank stopped answering

Launchers turn every exit code of a rank into 1, so the true one also stands in the run folder's exit.json.
"""

from __future__ import annotations


class ExitCode:
    """Process exit codes, documented in docs/exit-codes.md."""

    OK = 0
    FAILURE = 1  # an unexpected error: traceback shown, ours to mend
    RECIPE = 2
    DATA = 3
    ENVIRONMENT = 4
    REFUSED = 5
    DISK = 74
    STOPPED = 75
    NON_FINITE = 76
    HANG = 77
    INTERRUPTED = 130  # Ctrl-C where there is nothing to resume


class FinetuneError(Exception):
    """A fault with a place and a remedy. `str(error)` is the whole message shown to the user."""

    exit_code = ExitCode.FAILURE


class RecipeError(FinetuneError):
    """Something in the recipe, its overrides or the command line is wrong."""

    exit_code = ExitCode.RECIPE


class DataError(FinetuneError):
    """A data source is missing, unreadable or holds rows that cannot be trained on."""

    exit_code = ExitCode.DATA


class EnvironmentFault(FinetuneError):
    """The machine, its network or an installed package is not as needed."""

    exit_code = ExitCode.ENVIRONMENT


class HardwareError(EnvironmentFault):
    """Too little memory, a missing device, or fewer processes than asked for."""


class ModelError(FinetuneError):
    """The base model or the adapter is incomplete, or would not train what the recipe says."""

    exit_code = ExitCode.REFUSED


class ExportError(FinetuneError):
    """An export could not be proved equal to what was trained."""

    exit_code = ExitCode.REFUSED


class RefusedError(FinetuneError):
    """The command would overwrite or mix up earlier work."""

    exit_code = ExitCode.REFUSED


class DiskError(FinetuneError):
    """A write failed: no space, no permission, or an I/O error."""

    exit_code = ExitCode.DISK


class StoppedError(FinetuneError):
    """Stopped on request (Ctrl-C, SIGTERM); the same command continues the run."""

    exit_code = ExitCode.STOPPED


class NonFiniteError(FinetuneError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = ExitCode.NON_FINITE


class HangError(FinetuneError):
    """A rank stopped answering."""

    exit_code = ExitCode.HANG
