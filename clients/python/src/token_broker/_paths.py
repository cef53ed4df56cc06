"""Reads text files in the encodings that the tools of Windows write, and decides whether a path may be printed."""

from __future__ import annotations

import codecs
import os

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Unusable(Exception):
    """A file cannot be used. The text never quotes its content."""


def read(path: str | os.PathLike[str]) -> bytes:
    """Returns the text of the file, as UTF-8 if it is UTF-16 with a byte order mark, and without such a mark."""
    try:
        with open(path, "rb") as file:
            return to_utf8(file.read())
    except OSError as error:
        raise Unusable(f"{shown(path)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Unusable(f"{shown(path)} is malformed UTF-16") from None
    except ValueError:  # such as a zero byte in the path, which the text of this error may quote
        raise Unusable(f"{shown(path)} cannot be read") from None


def begins_with_mark(path: str | os.PathLike[str]) -> bool:
    """Returns whether the file begins with a byte order mark. A file that cannot be read has none."""
    try:
        with open(path, "rb") as file:
            return file.read(len(codecs.BOM_UTF8)).startswith(_MARKS)
    except (OSError, ValueError):
        return False


def to_utf8(content: bytes) -> bytes:
    """Removes the byte order mark, and turns UTF-16 that begins with one into UTF-8."""
    if content.startswith(codecs.BOM_UTF8):
        return content[len(codecs.BOM_UTF8) :]
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16").encode()
    return content


def shown(path: str | os.PathLike[str] | None) -> str:
    """Returns a path for an error, a log line or a `repr`: as it is if it exists or if its directory does, and
    otherwise a text that does not contain it. A frequent mistake is to give the content of a file, such as a bearer,
    instead of its path."""
    if path is None:
        return "None"
    text = os.fsdecode(path)
    is_content = "://" in text or any(ord(character) < 0x20 or ord(character) == 0x7F for character in text)
    # Neither base64 nor another key names a directory that exists, except the root and the current one.
    directory = os.path.dirname(text)  # of "//x" it is "//"
    is_in_directory = directory.strip("/\\") != "" and os.path.isdir(directory)
    if not is_content and (os.path.lexists(text) or is_in_directory):
        return text
    return "(path not shown: nothing is there)"
