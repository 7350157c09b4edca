import pytest

from onnx_intq.progress import bar


def test_the_bar_goes_to_stderr_on_terminals_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with bar("evaluate") as tick:
        tick(1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bar("evaluate") as tick:
        tick(1, 2)
    captured = capsys.readouterr()
    assert not captured.out
    assert "evaluate" in captured.err
    assert "1/2" in captured.err
