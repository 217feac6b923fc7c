"""The envelope of every image on disk: its kind, version and checksum.

Apart because it is all that the server's image and a watcher's have in common. The checksum shows
damage, not who wrote the image.

    image  = header, checksum, body
    header = magic, header's version, kind of the body, body's version, body's length
"""

from __future__ import annotations

import hashlib
import struct

_MAGIC = b"fsdimage"
_HEADER_VERSION = 1
# struct image_header {
#     char magic[8]; __le16 header_version; __le16 version; char kind[20]; __le64 length;
# };
_HEADER = struct.Struct("<8sHH20sQ")
_DIGEST_SIZE = 32
_BODY = _HEADER.size + _DIGEST_SIZE


class ImageError(ValueError):
    """The bytes are not an image that this program can use; the text says why, for the user."""


def pack(kind: str, version: int, body: bytes) -> bytes:
    """The image of a body. ``kind``: ASCII, at most 20 characters; ``version``: 16 bits."""
    name = kind.encode("ascii")
    if not 0 < len(name) <= 20:
        raise ValueError(f"a kind has 1 to 20 characters, not {kind!r}")
    header = _HEADER.pack(_MAGIC, _HEADER_VERSION, version, name, len(body))
    return header + _digest(header, body) + body


def unpack(data: bytes, kind: str, version: int) -> bytes:
    """The body of an image of this kind and version. Raises ImageError."""
    if not data.startswith(_MAGIC):
        short = _MAGIC.startswith(data)
        raise ImageError("the image is cut short" if short else "not an fsd image")
    if len(data) < _BODY:
        raise ImageError(f"the image is cut short: {len(data)} bytes, the header alone is {_BODY}")
    _, header_version, found_version, name, length = _HEADER.unpack_from(data)
    if header_version != _HEADER_VERSION:
        raise ImageError(
            f"the image's header has version {header_version}, this program reads {_HEADER_VERSION}"
        )
    body = data[_BODY:]
    if len(body) < length:
        raise ImageError(f"the image is cut short: {len(body)} of {length} bytes")
    if len(body) > length:
        raise ImageError(f"the image is damaged: {len(body) - length} bytes after its end")
    if _digest(data[: _HEADER.size], body) != data[_HEADER.size : _BODY]:
        raise ImageError("the image is damaged: its checksum is wrong")
    found = name.rstrip(b"\0").decode("ascii", "replace")
    if found != kind:
        raise ImageError(f"the image is of kind {found!r}, not {kind!r}")
    if found_version != version:
        raise ImageError(
            f"the image has version {found_version}, this program reads version {version}"
        )
    return body


def _digest(header: bytes, body: bytes) -> bytes:
    digest = hashlib.sha256(header)
    digest.update(body)
    return digest.digest()
