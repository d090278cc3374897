"""Where a source's rows are: local files, or a data set of the Hugging Face hub. No torch, no network."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from finetune.formats.example import Fault
from finetune.recipe.sections import Source
from finetune.registry import nearest

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TEXT_KINDS = ("jsonl", "json", "txt", "csv", "tsv")
PACKINGS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
SUFFIXES = "jsonl, ndjson, json, txt, csv, tsv (each also .gz, .bz2, .xz or .zst), parquet or arrow"
# What `datasets` writes beside the rows, and what it may leave there from earlier work.
BOOKKEEPING = ("state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
TRAIN_WORDS = ("train",)
HELD_OUT_WORDS = ("test", "validation", "valid", "val", "dev", "eval", "heldout")


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine.

    Attributes:
        path: the file, with ~ expanded.
        kind: jsonl, json, txt, csv, tsv, parquet or arrow.
        packing: gzip, bzip2, xz or zstd where it is compressed, else empty.
        name: how places call it.
    """

    path: Path
    kind: str
    packing: str
    name: str


@dataclass(frozen=True)
class LocalFiles:
    """The files of a source, in the order they are read.

    Attributes:
        files: at least one.
        ignored: files of a folder or glob that are not read, since their names are not those of data.
    """

    files: tuple[LocalFile, ...]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, which is only loaded when its rows are read."""

    name: str
    split: str
    revision: str | None

    def note(self) -> str | None:
        """What a report should say of it; None when the same rows will come again."""
        if self.revision is not None:
            return None
        return f"{self.name}: no revision is pinned, so a later run may read other rows; set the source's revision"


def kind_of(path: Path) -> tuple[str | None, str]:
    """What a file name says of its content (None when unknown), and how it is compressed (empty when not)."""
    packing = PACKINGS.get(path.suffix.lower(), "")
    kind = KINDS.get((path.with_suffix("") if packing else path).suffix.lower())
    return (None if packing and kind not in TEXT_KINDS else kind), packing


def locate(source: Source) -> LocalFiles | HubDataset | Fault:
    """Decide what `source.path` means.

    What exists is local, and so is a glob. What has a data file's suffix, is absolute, starts with . or ~, or lies in
    an existing folder was meant to be local. Only `name` or `owner/name` without a suffix is left for the hub.
    """
    path = Path(source.path).expanduser()
    kind, packing = kind_of(path)
    try:
        exists, folder = path.exists(), path.is_dir()
    except OSError as error:
        found = f"a path that cannot be looked up ({error.strerror})"
        return Fault("", found, "a data file", "correct the path", source.path)
    except ValueError:
        return Fault("", "a path with a NUL character", "a data file", "correct the path", source.path)
    if folder:
        return _folder(path, source)
    if exists and not path.is_file():
        return _no_file(source.path)
    if exists and kind is None:
        found = f"a file with the suffix {path.suffix or 'none'!r}"
        return Fault("", found, SUFFIXES, "rename or convert the file", source.path)
    if exists and kind:
        return _no_split(source, "file") or LocalFiles((LocalFile(path, kind, packing, source.path),))
    if glob.has_magic(source.path):
        return _matches(path, source)
    parts = Path(source.path).parts
    meant_local = kind is not None or path.is_absolute() or source.path.startswith((".", "~")) or packing
    if meant_local or len(parts) > 2 or (len(parts) > 1 and Path(parts[0]).is_dir()):
        return _missing(path, source)
    return HubDataset(source.path, source.split, source.revision)


def _no_file(name: str) -> Fault:
    """The fault of what can be read once at the most."""
    expected, fix = "a file, which can be read more than once", "write what comes from it to a file first"
    return Fault("", "a pipe or a device", expected, fix, name)


def _no_split(source: Source, what: str) -> Fault | None:
    if source.split == "train":
        return None
    found = f"split {source.split!r} of a local {what}, which has only 'train'"
    return Fault("split", found, "no split", "name the file that holds those rows", source.path)


def _folder(path: Path, source: Source) -> LocalFiles | Fault:
    """All data files below a folder, or those that `datasets` saved there."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in path.glob("*/state.json"))
        if source.split not in splits:
            fix = f"set split to one of {', '.join(splits)}" if splits else "save the data set again"
            return Fault("split", f"no split {source.split!r}", "a split of the saved data set", fix, source.path)
        return _saved(path / source.split, source)
    if (path / "state.json").is_file():
        return _no_split(source, "folder") or _saved(path, source)
    if fault := _no_split(source, "folder"):
        return fault
    below: list[Path] = []
    for folder, names, files in os.walk(path):
        names[:] = sorted(name for name in names if not _hidden(name))
        below += (Path(folder, file) for file in sorted(files) if not _hidden(file))
    return _data_files(sorted(below), source, f"a folder with {_counted(len(below), 'file')}, none of them a data file")


def _hidden(name: str) -> bool:
    """Whether a folder's entry is hidden, or a cache of Python or `datasets`."""
    return name.startswith((".", "__pycache__")) or (name.startswith("cache-") and name.endswith(".arrow"))


def _saved(path: Path, source: Source) -> LocalFiles | Fault:
    """The files of a data set that `Dataset.save_to_disk` wrote, in its order."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        found = "a state.json that does not list the data files"
        return Fault("", found, "a folder that Dataset.save_to_disk wrote", "save the data set again", source.path)
    if not names or not all((path / name).is_file() for name in names):
        found = "a saved data set whose files are not all there"
        return Fault("", found, f"the files {', '.join(names) or 'that hold the rows'}", "copy it again", source.path)
    return LocalFiles(tuple(LocalFile(path / name, "arrow", "", str(path / name)) for name in names))


def _matches(path: Path, source: Source) -> LocalFiles | Fault:
    """The data files that a glob stands for."""
    if fault := _no_split(source, "glob"):
        return fault
    found = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [match for match in found if match.is_file()]
    if files:
        return _data_files(files, source, f"{_counted(len(files), 'match')} of which none is a data file", parted=True)
    root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    try:
        names = [entry.name for entry in root.iterdir()]
    except OSError:
        names = []
    near = [str(root / name) for name in nearest(path.relative_to(root).parts[0], names)]
    fix = f"the nearest are {', '.join(near)}" if near else "correct the pattern"
    return Fault("", "a pattern that nothing matches", f"a data file ({SUFFIXES})", fix, source.path)


def _data_files(paths: Iterable[Path], source: Source, nothing: str, *, parted: bool = False) -> LocalFiles | Fault:
    """Those of `paths` that hold data.

    Args:
        paths: files, in order.
        source: what named them.
        nothing: what was found when none of them does.
        parted: whether the user chose them by a pattern, so that training and held-out files are meant together.
    """
    files: list[LocalFile] = []
    ignored: list[str] = []
    for path in paths:
        kind, packing = kind_of(path)
        if kind is None or path.name in BOOKKEEPING:
            ignored.append(str(path))
        elif path.exists() and not path.is_file():
            return _no_file(str(path))
        else:
            files.append(LocalFile(path, kind, packing, str(path)))
    if not files:
        return Fault("", nothing, f"a data file ({SUFFIXES})", "name a data file", source.path)
    if not parted and (pair := _mixed_splits(files)):
        found = f"files of training and of held-out rows ({pair[0].path.name}, {pair[1].path.name})"
        fix = f"name those to read, as {Path(source.path) / '**' / 'train*'}"
        return Fault("", found, "files of one split", fix, source.path)
    return LocalFiles(tuple(files), tuple(ignored))


def _mixed_splits(files: list[LocalFile]) -> tuple[LocalFile, LocalFile] | None:
    """A file that its name calls training rows and one that it calls held out, where a folder has both."""

    def of(words: tuple[str, ...]) -> LocalFile | None:
        return next((file for file in files if _first_word(file.path.name) in words), None)

    train, held_out = of(TRAIN_WORDS), of(HELD_OUT_WORDS)
    return (train, held_out) if train and held_out else None


def _first_word(name: str) -> str:
    """`train` of train-00000-of-00002.parquet."""
    lowered = name.lower()
    return lowered[: next((at for at, letter in enumerate(lowered) if not letter.isalpha()), len(lowered))]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"


def _missing(path: Path, source: Source) -> Fault:
    """A missing local file, with the files whose names come nearest."""
    try:
        names = [file.name for file in path.parent.iterdir()]
    except OSError:
        names = []
    near = [str(path.parent / name) for name in nearest(path.name, [name for name in names if name != path.name])]
    parent = "" if path.parent.is_dir() else f"; the folder {path.parent.absolute()} does not exist either"
    fix = f"did you mean {' or '.join(near)}?" if near else "correct the path"
    found = f"no file {path.absolute()}{parent}"
    if path.is_symlink():
        found = f"a link to {os.readlink(path)}, which does not exist"
    return Fault("", found, f"a data file ({SUFFIXES})", fix, source.path)
