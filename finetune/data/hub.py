"""Rows of a Hugging Face hub data set: the only place of the data that may use the network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from finetune.data.json_rows import Placed
from finetune.data.source import HubDataset
from finetune.data.tables import absent_dropped
from finetune.errors import DataError, EnvironmentFault
from finetune.formats.example import describe


def rows(where: HubDataset, streaming: bool) -> Iterator[Placed]:
    """Rows of a hub data set, one after another.

    Args:
        where: which data set, split and revision.
        streaming: fetch rows as they are asked for, instead of all of them first.

    Raises:
        DataError: it does not exist or lacks the split.
        EnvironmentFault: the hub cannot be reached.
    """
    import datasets

    unknown = (datasets.exceptions.DatasetNotFoundError, ValueError)
    unreachable = (OSError, datasets.exceptions.DatasetsError)
    try:
        loaded = datasets.load_dataset(where.name, split=where.split, revision=where.revision, streaming=streaming)
    except unknown as error:
        raise DataError(
            f"{where.name}: no such local file, and the Hugging Face hub gives no data set for it "
            f"(split {where.split!r}, revision {where.revision or 'default'!r}): {_reason(error)}; correct path, "
            "split or revision; a private or gated one needs a token in HF_TOKEN"
        ) from error
    except unreachable as error:
        raise EnvironmentFault(
            f"{where.name}: no such local file, and the Hugging Face hub cannot be reached: {_reason(error)}; "
            "name a local file, or try again with a connection"
        ) from error
    if not isinstance(loaded, datasets.Dataset | datasets.IterableDataset):
        raise DataError(f"{where.name}: the split {where.split!r} gave {describe(loaded)}; name one split")
    number = -1
    try:
        for number, values in enumerate(loaded):
            yield number, f"{where.name}[{where.split}] row {number + 1}", _row(values)
    except unreachable as error:
        raise EnvironmentFault(
            f"{where.name}: the Hugging Face hub broke off after row {number + 1}: {_reason(error)}; try again"
        ) from error


def _row(values: Any) -> dict[str, Any]:
    return absent_dropped(dict(values))


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def commit(where: HubDataset) -> str:
    """The commit that the revision of a data set stands for now; the revision itself where the hub does not answer."""
    revision = where.revision or "main"
    if len(revision) == 40 and all(letter in "0123456789abcdef" for letter in revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return str(HfApi().dataset_info(where.name, revision=revision).sha)
    except (HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, OSError, ValueError):
        return revision  # what is wrong with it is told when its rows are read
