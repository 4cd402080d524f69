"""Log messages that must not repeat."""

from __future__ import annotations

import logging

_WARNED: set[str] = set()


def warn_once(log: logging.Logger, text: str) -> None:
    """Log a warning unless this process has logged the same text before."""
    if text not in _WARNED:
        _WARNED.add(text)
        log.warning(text)
