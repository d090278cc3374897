"""Text files opened, compressed or not, and what is no text told by its first bytes."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Any, BinaryIO, cast

from finetune.formats.example import Fault

MAGIC = {
    b"\x1f\x8b": "gzip data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ\x00": "xz data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"PAR1": "Parquet data",
    b"ARROW1": "Arrow data",
    b"PK\x03\x04": "a zip archive",
}
HEAD = 1 << 20
ZSTD_CHUNK = 1 << 14  # small, since one byte may become thousands
LFS = b"version https://git-lfs.github.com/spec/"


class MissingPackage(Exception):
    """A file needs a package that is not installed."""


def open_file(path: Path, packing: str) -> BinaryIO:
    """`path` from its start, decompressed.

    Args:
        path: the file.
        packing: gzip, bzip2, xz, zstd or empty; see source.kind_of.

    Raises:
        MissingPackage: zstd, without the package zstandard.
        OSError: the file cannot be opened.
    """
    match packing:
        case "gzip":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case "bzip2":
            return cast(BinaryIO, bz2.open(path, "rb"))
        case "xz":
            return cast(BinaryIO, lzma.open(path, "rb"))
        case "zstd":
            return _zstd(path)
    return open(path, "rb")


def _zstd(path: Path) -> BinaryIO:
    try:
        import zstandard
    except ImportError as error:
        raise MissingPackage("zstd data, and the package zstandard is not installed") from error

    class Reader(io.RawIOBase):
        """The decompressed bytes of one frame after another; a file that ends inside a frame is noticed."""

        def __init__(self) -> None:
            self._file = open(path, "rb")  # noqa: SIM115 - closed with this reader
            self._frame: Any = None
            self._ready = memoryview(b"")

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
            while not self._ready:
                raw = self._file.read(ZSTD_CHUNK)
                if not raw:
                    if self._frame is not None:
                        raise EOFError("the file ends inside a frame")
                    return 0
                self._ready = memoryview(self._decompressed(raw))
            count = min(len(buffer), len(self._ready))
            buffer[:count], self._ready = self._ready[:count], self._ready[count:]
            return count

        def _decompressed(self, raw: bytes) -> bytes:
            parts = []
            while raw:
                self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    parts.append(self._frame.decompress(raw))
                except zstandard.ZstdError as error:
                    raise EOFError(str(error)) from error
                raw = b""
                if self._frame.eof:
                    raw, self._frame = self._frame.unused_data, None
            return b"".join(parts)

        def close(self) -> None:
            self._file.close()
            super().close()

    return cast(BinaryIO, io.BufferedReader(Reader(), 1 << 17))


def head_of(stream: BinaryIO) -> bytes:
    """The first HEAD bytes of a file, or those before its damage, which whoever reads on will meet again."""
    parts: list[bytes] = []
    held = 0
    try:
        while held < HEAD and (part := stream.read1(HEAD - held)):  # type: ignore[attr-defined]
            parts.append(part)
            held += len(part)
    except (EOFError, OSError, zlib.error, lzma.LZMAError):
        pass
    return b"".join(parts)


def lfs_pointer(head: bytes, name: str) -> Fault | None:
    """The fault of a file that git-lfs has not fetched, as its first bytes say."""
    if not head.startswith(LFS):
        return None
    return Fault("", "a git-lfs pointer", "the file itself", "run git lfs pull", name)


def not_text(head: bytes, name: str) -> Fault | None:
    """The fault of a file whose first bytes are not text of the kind its name says."""
    for magic, what in MAGIC.items():
        if head.startswith(magic):
            return Fault("", what, "text, as the file's name says", "give the file its right suffix", name)
    if fault := lfs_pointer(head, name):
        return fault
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Fault("", "UTF-16 text", "UTF-8 text", "save the file as UTF-8", name)
    if b"\0" in head:
        return Fault("", "binary data", "text, as the file's name says", "name a data file", name)
    return None
