from types import SimpleNamespace

from onnx_intq.engine_log import Log, logger, one_line


class ILogger:
    ERROR = 1

    def __init__(self) -> None:
        self.ready = True


def test_the_first_error_and_the_layers_are_kept() -> None:
    log = Log()
    assert log.first_error == "it gives no reason"
    receiver = logger(SimpleNamespace(ILogger=ILogger), log)
    for severity, message in (
        (4, "verbose"),
        (3, "Layers:\n one"),
        (1, "first\n  error."),
        (0, "second error"),
        (2, "warning"),
    ):
        receiver.log(severity, message)
    assert (log.first_error, log.layers) == ("first error", "Layers:\n one")


def test_lines_are_joined() -> None:
    assert one_line(" a\n\tb  c. ") == "a b c"
