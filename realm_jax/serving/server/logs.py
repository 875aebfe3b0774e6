"""One JSON object a line on stderr. Nothing of prompts and answers is in it, unless asked for."""

import json
import logging
import sys
import time
from typing import Any

LOGGERS = ("realm", "uvicorn.error")


class JSONFormatter(logging.Formatter):
    """A record as a line of JSON: time, level, event, and the fields that it was given."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}"
            f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info is not None:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging() -> logging.Handler:
    """The server's events, and uvicorn's warnings, go to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "realm" else logging.WARNING)
    return handler


def event(name: str, **fields: Any) -> None:
    """The event is logged."""
    logging.getLogger("realm.server").info(name, extra={"fields": fields})


def failed(name: str, error: BaseException, **fields: Any) -> None:
    """The failure is logged, with where it came from."""
    logging.getLogger("realm.server").error(name, exc_info=error, extra={"fields": fields})


class LoggedProgress:
    """How a model's loading goes, as events. model: its name."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._is_loading = False

    def loading(self, done: int, total: int) -> None:
        """Bytes of weights that have been read: the first of them are an event."""
        del done
        if not self._is_loading:
            self._is_loading = True
            event("loading", model=self._model, bytes=total)

    def loaded(self) -> None:
        """All of them have."""
        event("loaded", model=self._model)

    def compiling(self, program: str) -> None:
        """A program runs for the first time."""
        event("compiling", model=self._model, program=program)

    def notice(self, text: str) -> None:
        """Something that the operator should know."""
        event("note", model=self._model, text=text)
