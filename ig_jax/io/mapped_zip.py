"""The members of a zip as ranges of its bytes, which are mapped into memory and never copied.

Python's own zipfile reads the directory at the end of the file. What it says is checked against
the bytes that are there before it is used.
"""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from typing import IO, NamedTuple

import numpy as np

from ig_jax.errors import shown
from ig_jax.io import files

START = b"PK\x03\x04"  # of a member's own header, and so of a zip
HEADER = struct.Struct("<4s22x2H")  # of a member: the above, lengths of its name and extra field
ENCRYPTED = 1  # a flag
MOST_PER_BYTE = 1032  # that deflate can unpack to
# What zipfile raises for a damaged directory; NotImplementedError: for ways that it does not know.
_DAMAGE = (
    *(ValueError, LookupError, OverflowError, EOFError, NotImplementedError, OSError),
    *(struct.error, zipfile.BadZipFile),
)


class Member(NamedTuple):
    """Entry of a zip's directory; there may be a million."""

    start: int  # of its own header
    packed: int  # bytes in the zip
    size: int  # bytes of its content
    method: int  # of compression
    checksum: int
    is_encrypted: bool
    is_link: bool

    @property
    def is_stored(self) -> bool:
        """Returns whether its content lies in the file as it is."""
        return self.method == zipfile.ZIP_STORED and not self.is_encrypted


class MappedZip:
    """`members` by their names, in the order of the zip; the open file is not needed afterwards.

    Raises:
      UserError: the file is empty; does not name it.
      ValueError: it is no zip, damaged, or has two members of one name.
    """

    def __init__(self, file: IO[bytes]):
        self._bytes = np.frombuffer(files.mapped(file), np.uint8)
        try:
            with zipfile.ZipFile(file) as archive:
                found = archive.infolist()
        except _DAMAGE as error:
            raise ValueError(str(error)) from error
        self.members: dict[str, Member] = {}
        for info in found:
            if info.filename in self.members:
                raise ValueError(f"it has two members {shown(info.filename)}")
            self.members[info.filename] = Member(
                *(info.header_offset, info.compress_size, info.file_size, info.compress_type),
                *(info.CRC, bool(info.flag_bits & ENCRYPTED)),
                stat.S_ISLNK(info.external_attr >> 16),
            )

    def stored(self, name: str) -> np.ndarray:
        """The bytes of a member that is neither compressed nor encrypted: a read-only uint8 view.

        Its checksum is not read.

        Raises:
          ValueError: it is not where the directory says.
        """
        member = self.members[name]
        if member.size != member.packed:
            raise ValueError(f"the member {shown(name)} has two sizes")
        return self._raw(name)

    def content(self, name: str) -> np.ndarray | bytes:
        """Returns the content of a member that is stored, as `stored`, or compressed by deflate.

        Raises:
          ValueError: it is not where the directory says, or not what it says.
        """
        member = self.members[name]
        if member.method == zipfile.ZIP_STORED:
            return self.stored(name)
        if member.size > MOST_PER_BYTE * member.packed:
            raise ValueError(
                f"the {member.packed:,} bytes of the member {shown(name)} cannot unpack to "
                f"{member.size:,}"
            )
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            # One byte more than there should be, to see that there is none.
            content = unpacker.decompress(self._raw(name), member.size + 1)
        except zlib.error as error:
            raise ValueError(str(error)) from error
        if len(content) != member.size or zlib.crc32(content) != member.checksum:
            raise ValueError(f"the member {shown(name)} unpacks to something else than it should")
        return content

    def _raw(self, name: str) -> np.ndarray:
        member = self.members[name]
        start, end = member.start, member.start + HEADER.size
        if 0 <= start and end <= self._bytes.size:
            signature, of_name, of_extra = HEADER.unpack(self._bytes[start:end])
            known_as = self._bytes[end : end + of_name].tobytes()
            start = end + of_name + of_extra
            end = start + member.packed
            if signature == START and end <= self._bytes.size and known_as in _encodings(name):
                return self._bytes[start:end]
        raise ValueError(f"no member where {shown(name)} should begin")


def _encodings(name: str) -> tuple[bytes, ...]:
    """Encodings of a name in a zip: UTF-8, or as zipfile reads names without that flag."""
    return name.encode(errors="replace"), name.encode("cp437", errors="replace")
