"""What TensorRT says while it works: the first error, and the text about an engine's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsInt

if TYPE_CHECKING:
    from onnx_intq import engine_api as api
    from onnx_intq.engine_library import Library


class Log:
    """Collects messages; `logger` makes what the library takes.

    Attributes:
        first_error: One line, without a full stop.
        layers: The engine's layers, "" where the library does not tell.
    """

    def __init__(self) -> None:
        self.first_error = "it gives no reason"
        self.layers = ""
        self._failed = False

    def add(self, message: str, is_error: bool) -> None:
        """Take one message."""
        if is_error and not self._failed:
            self.first_error, self._failed = one_line(message), True
        elif message.startswith("Layers:"):
            self.layers = message


def logger(trt: Library, log: Log) -> api.ILogger:
    """A logger of the library's that fills `log`. It must live as long as what it is given to."""

    class Logger(trt.ILogger):  # type: ignore[name-defined,misc]  # known at run time alone
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 demands this very form

        def log(self, severity: SupportsInt, msg: str) -> None:
            log.add(msg, int(severity) <= int(trt.ILogger.ERROR))

    found: api.ILogger = Logger()
    return found


def one_line(text: str) -> str:
    """Text without line breaks, runs of spaces and a full stop at the end."""
    return " ".join(text.split()).rstrip(".")
