"""The blocks of README and of the pages of docs/ run as they stand, in order, each page alone."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The arguments of every `onnx-intq` in the console blocks; what they print is left out."""
    lines = "".join(blocks(text, "console")).splitlines()
    found = [line.removeprefix("$ onnx-intq ") for line in lines if line.startswith("$ onnx-intq ")]
    return [[part.strip("\"'") for part in re.findall(r"\"[^\"]*\"|'[^']*'|\S+", c)] for c in found]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    (tmp_path / "models").symlink_to(ROOT / "models")
    for arguments in commands(text):
        done = subprocess.run(
            [sys.executable, "-m", "onnx_intq.cli", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    for code in blocks(text, "python"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)


def test_readme_and_pages_have_blocks() -> None:
    found = {page.name: len(commands(page.read_text(encoding="utf-8"))) for page in PAGES}
    assert found["README.md"] > 5
    assert {name for name, count in found.items() if count} >= {
        "README.md",
        "engines.md",
        "integers.md",
        "rnnt.md",
        "sub8bit.md",
        "transformers.md",
    }


def test_readme_links_every_page_and_links_lead_somewhere() -> None:
    assert all(f"(docs/{page.name}" in README for page in DOCS)
    for page in PAGES:
        for target in LINK.findall(page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_readme_names_every_command() -> None:
    from onnx_intq.cli import cli

    assert all(f"`{name}" in README for name in cli.commands)


def test_contributing_pass_is_a_pass() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    space: dict[str, object] = {"__name__": "onnx_intq.passes.drop_noise"}
    exec(compile(code, "drop_noise.py", "exec"), space)
    assert "DropNoise" in space
