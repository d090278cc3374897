"""Where a source's rows are: a local file, or a data set of the Hugging Face hub. No torch, no network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from finetune.formats.example import Fault
from finetune.recipe.sections import Source
from finetune.registry import nearest

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
PACKED_KINDS = ("jsonl", "json", "csv")
SUFFIXES = "jsonl, ndjson, json, csv (each also .gz) or parquet"


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine.

    Attributes:
        path: the file, as the recipe writes it, with ~ expanded.
        kind: jsonl, json, parquet or csv.
        packed: whether it is gzip-compressed.
    """

    path: Path
    kind: str
    packed: bool


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, which is only loaded when its rows are read."""

    name: str
    split: str
    revision: str | None


def kind_of(path: Path) -> tuple[str | None, bool]:
    """What a file name says of its content (None when unknown), and whether it is compressed."""
    packed = path.suffix.lower() == ".gz"
    kind = KINDS.get((path.with_suffix("") if packed else path).suffix.lower())
    return (None if packed and kind not in PACKED_KINDS else kind), packed


def locate(source: Source) -> LocalFile | HubDataset | Fault:
    """Decide what `source.path` means.

    What exists is local. What has a data file's suffix, is absolute, starts with . or ~, or lies in an existing folder
    was meant to be local. Only `name` or `owner/name` without a suffix is left for the hub.
    """
    path = Path(source.path).expanduser()
    kind, packed = kind_of(path)
    try:
        exists, folder = path.exists(), path.is_dir()
    except OSError as error:
        found = f"a path that cannot be looked up ({error.strerror})"
        return Fault("", found, "a data file", "correct the path", source.path)
    if folder:
        return _folder(path, source)
    if exists and kind is None:
        return Fault(
            "", f"a file with the suffix {path.suffix or 'none'!r}", SUFFIXES, "rename or convert the file", source.path
        )
    if exists and kind:
        if source.split != "train":
            found = f"split {source.split!r} of a local file, which has only 'train'"
            return Fault("split", found, "no split", "name the file that holds those rows", source.path)
        return LocalFile(path, kind, packed)
    parts = Path(source.path).parts
    meant_local = kind is not None or path.is_absolute() or source.path.startswith((".", "~")) or packed
    if meant_local or len(parts) > 2 or (len(parts) > 1 and Path(parts[0]).is_dir()):
        return _missing(path, source)
    return HubDataset(source.path, source.split, source.revision)


def _folder(path: Path, source: Source) -> Fault:
    inside = sorted(str(file) for file in path.iterdir() if file.is_file() and kind_of(file)[0])
    fix = f"name one, or list several as sources: {', '.join(inside[:5])}" if inside else "name a file"
    found = f"a folder with {len(inside)} data file{'' if len(inside) == 1 else 's'}"
    return Fault("", found, f"a file ({SUFFIXES})", fix, source.path)


def _missing(path: Path, source: Source) -> Fault:
    """A missing local file, with the files whose names come nearest."""
    try:
        names = [file.name for file in path.parent.iterdir()]
    except OSError:
        names = []
    near = [str(path.parent / name) for name in nearest(path.name, names)]
    parent = "" if path.parent.is_dir() else f"; the folder {path.parent.absolute()} does not exist either"
    fix = f"did you mean {' or '.join(near)}?" if near else "correct the path"
    return Fault("", f"no file {path.absolute()}{parent}", f"a data file ({SUFFIXES})", fix, source.path)
