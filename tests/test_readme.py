"""The README's blocks run as they stand, in order, in one folder."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_readme_blocks_run(tmp_path: Path) -> None:
    commands = [
        line.removeprefix("$ onnx-intq ")
        for block in blocks("console")
        for line in block.splitlines()
        if line.startswith("$ onnx-intq ")
    ]
    assert len(commands) > 5
    for command in commands:
        arguments = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', command)]
        done = subprocess.run(
            [sys.executable, "-m", "onnx_intq.cli", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
    for code in blocks("python"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_readme_names_every_command() -> None:
    from onnx_intq.cli import cli

    assert all(f"`{name}" in README for name in cli.commands)


def test_contributing_pass_is_a_pass() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space: dict[str, object] = {"__name__": "onnx_intq.passes.drop_noise"}
    exec(compile(code, "drop_noise.py", "exec"), space)
    assert "DropNoise" in space
