"""Kinds of weight files, detected by their first bytes: a suffix says what somebody hoped for.

The kinds that are read are safetensors, the JSON index of a sharded set, and both containers of
torch.save. For everything else that people end up with instead there is a true sentence.
"""

from __future__ import annotations

import re
import struct
import zipfile
from enum import Enum
from pathlib import Path

from ig_jax.errors import UserError, shown
from ig_jax.io import files

START = 512  # bytes that tell a kind
DOWNLOAD = "download it again"

# First bytes -> what it is, and the way out.
SIGNATURES = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights; fetch them: git lfs pull"),
    (b"\x93NUMPY", "is a NumPy array (.npy), which has no names; save a state dict"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it first"),
    (b"BZh", "is compressed with bzip2; unpack it first"),
    (b"\xfd7zXZ\x00", "is compressed with xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
    (b"Rar!", "is a RAR archive; unpack it first"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes; export the weights as safetensors"),
    (b"GGUF", "is a GGUF file of quantised weights; take the original ones"),
    (b"%PDF", f"is a PDF document; {DOWNLOAD}"),
    (b"\x89PNG", f"is a PNG image; {DOWNLOAD}"),
    (b"\xff\xd8\xff", f"is a JPEG image; {DOWNLOAD}"),
    (b"PK\x05\x06", f"is an empty zip; {DOWNLOAD}"),
)
# The first member of the tar files that PyTorch wrote before its first release, and tar's own mark.
TAR_MEMBERS = (b"sys_info\0", b"pickle\0", b"tensors\0", b"storages\0")
TAR = (257, b"ustar")
_TEXT = re.compile(rb"[\t\n\r\x20-\x7e]+")


class WeightsKind(Enum):
    """The kinds that are read."""

    SAFETENSORS = "safetensors"
    INDEX = "the index of a sharded set"
    TORCH = "torch.save"


def kind_of(file: Path) -> WeightsKind:
    """The kind of a regular file of weights.

    Raises:
      UserError: it is empty, unreadable, or of another kind, which the message names.
    """
    with files.open_regular(file) as opened:
        try:
            start, size = opened.read(START), file.stat().st_size
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    if not start:
        raise UserError(f"{file}: is empty (0 bytes); {DOWNLOAD}")
    said = next((text for mark, text in SIGNATURES if start.startswith(mark)), None)
    if said:
        raise UserError(f"{file}: {said}")
    # Eight bytes that count those of a header of JSON, which is never as long as text would count.
    if start[8:9] == b"{" and not _TEXT.fullmatch(start[:8]):
        _check_length(file, start, size)
        return WeightsKind.SAFETENSORS
    if start.startswith(b"PK\x03\x04"):
        _check_zip(file)
        return WeightsKind.TORCH
    if start.startswith(b"\x80"):
        return WeightsKind.TORCH
    return _other(file, start)


def _check_length(file: Path, start: bytes, size: int) -> None:
    (header,) = struct.unpack("<Q", start[:8])
    if header > size - 8:
        raise UserError(
            f"{file}: is a safetensors file cut short ({size:,} bytes, of which its header alone "
            f"needs {header + 8:,}); {DOWNLOAD}"
        )


def _check_zip(file: Path) -> None:
    """Refuses zips of two other kinds by name; what is damaged is left to the reader."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        LookupError,
        NotImplementedError,
        struct.error,
    ):
        return
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        raise UserError(
            f"{file}: is a TorchScript archive, a program; in PyTorch, save the state_dict() of "
            "torch.jit.load(f) instead"
        )
    if names and all(name.endswith(".npy") for name in names):
        raise UserError(f"{file}: is NumPy's .npz; save the arrays as safetensors")


def _other(file: Path, start: bytes) -> WeightsKind:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    offset, mark = TAR
    if start.startswith(TAR_MEMBERS) or start[offset:].startswith(mark):
        raise UserError(
            f"{file}: is a tar file, as PyTorch wrote before 0.1.10 or as files are packed; unpack "
            "it, or save it again with a newer PyTorch"
        )
    if text.startswith(b"<"):
        page = "a web page (HTML)" if b"html" in text.lower() else "an XML file"
        raise UserError(f"{file}: is {page}, not weights: its link led elsewhere; {DOWNLOAD}")
    if text.startswith(b"{"):
        return WeightsKind.INDEX
    if _TEXT.fullmatch(start):
        line = text.splitlines()[0].decode() if text else ""
        raise UserError(f"{file}: is a text file that begins with {shown(line)}; {DOWNLOAD}")
    raise UserError(
        f"{file}: is neither safetensors nor a file of torch.save: it begins with "
        f"{shown(start[:8])}; {DOWNLOAD}, or save its state dict as safetensors"
    )
