"""Log lines."""

from __future__ import annotations

import contextlib
import logging

_logger = logging.getLogger("token_broker")


def log(level: int, text: str, *arguments: object) -> None:
    """Logs a line. What handles it belongs to the program, and must end no call and no watch when it fails."""
    with contextlib.suppress(Exception):  # it cannot be logged either
        _logger.log(level, text, *arguments)
