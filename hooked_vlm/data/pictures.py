"""Image files as data sets have them: there, readable, and of a picture."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from hooked_vlm.data.report import BadRow

SUFFIXES = (".jpg", ".jpeg", ".png")
# What PIL raises for files that are no images, are cut short, or would fill the memory.
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    LookupError,
    struct.error,
    Image.DecompressionBombError,
)


class Pictures:
    """Checks image files, and each of them once.

    Args:
        decode: whether files are decoded to their end. Otherwise they only have to be there.
        blank: whether a picture of a single colour is good; in a folder of photographs it stands
            for one that could not be had.
    """

    def __init__(self, decode: bool = True, blank: bool = False):
        self.decode = decode
        self.blank = blank
        self._found: dict[Path, tuple[str, ...]] = {}
        self._seen: dict[bytes, str] = {}

    def check(self, file: Path) -> None:
        """Passes a good file.

        Raises:
            BadRow: it is not there, cannot be read, or shows nothing.
        """
        if file not in self._found:
            self._found[file] = self._wrong(file)
        if wrong := self._found[file]:
            raise BadRow(*wrong)

    def check_new(self, file: Path, name: str) -> None:
        """Passes a good file that shows no picture of an earlier one, where files are decoded.

        Args:
            file: the file.
            name: what a later copy of it is told that it repeats.

        Raises:
            BadRow: a bad file, or a copy of an earlier one.
        """
        self.check(file)
        if self.decode:
            self.once(file.read_bytes(), name)

    def once(self, content: bytes, name: str) -> None:
        """Passes what was not there before.

        Raises:
            BadRow: the content was there, under another name.
        """
        digest = hashlib.blake2b(content, digest_size=16).digest()
        if (first := self._seen.setdefault(digest, name)) != name:
            raise BadRow("duplicate image", f"shows the same as {first}")

    def _wrong(self, file: Path) -> tuple[str, ...]:
        if not file.is_file():
            return "image not there", f"{str(file)!r} is not there"
        if not self.decode:
            return ()
        try:
            with Image.open(io.BytesIO(file.read_bytes())) as image:
                flat = image.convert("RGB").getcolors(1) is not None
        except UNREADABLE as error:
            return "unreadable image", f"{str(file)!r} is no image that can be read: {error}"
        if flat and not self.blank:
            return "image of a single colour", f"{str(file)!r} shows a single colour"
        return ()


def image_files(folder: Path) -> Iterator[Path]:
    """The files of a folder in the order of their names, without hidden ones."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            yield file


def check_suffix(file: Path) -> None:
    """Passes a file that is called an image.

    Raises:
        BadRow: it is called otherwise.
    """
    if file.suffix.lower() not in SUFFIXES:
        raise BadRow("not called an image", f"it ends in none of {', '.join(SUFFIXES)}")


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, in the order of their names, without hidden ones.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(folder)!r}; give the folder of the data set as it is unpacked"
        )
    return sorted(one for one in folder.iterdir() if one.is_dir() and one.name[0] != ".")
