import ast
from pathlib import Path

import onnx_intq

FOLDER = Path(onnx_intq.__file__).parent
API, LIBRARY = FOLDER / "engine_api.py", FOLDER / "engine_library.py"


def declared(file: Path) -> set[str]:
    """Names of the classes' members, dunders left out."""
    classes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef)]
    nodes = [node for found in classes for node in found.body]
    methods = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    fields = {
        node.target.id
        for node in nodes
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return {name for name in methods | fields if not name.startswith("__")}


def test_no_name_is_declared_in_vain() -> None:
    """What the code no longer uses need not be looked up in every release."""
    users = [f for f in FOLDER.glob("engine*.py") if f not in {API, LIBRARY}]
    read = [node for f in users for node in ast.walk(ast.parse(f.read_text()))]
    used = {node.attr for node in read if isinstance(node, ast.Attribute)}
    overridden = {node.name for node in read if isinstance(node, ast.FunctionDef)}
    assert declared(API) | declared(LIBRARY) <= used | overridden


def test_one_file_imports_the_libraries() -> None:
    imports = {"tensorrt", "tensorrt_rtx"}
    for file in [*FOLDER.rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not imports & {name.partition(".")[0] for name in names}, file
    using = [f.name for f in FOLDER.rglob("*.py") if "import_module(module)" in f.read_text()]
    assert using == ["engine.py"]
