"""What torch logs of a failure, whole tracebacks, is in the error that follows, and is not shown twice."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what torch logs in this thread meanwhile; other threads' is not touched."""
    mine = threading.get_ident()

    def of_others(record: logging.LogRecord) -> bool:
        return record.thread != mine

    named = [name for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] == "torch"]
    loggers = [logging.getLogger(name) for name in named]
    for logger in loggers:
        logger.addFilter(of_others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(of_others)
