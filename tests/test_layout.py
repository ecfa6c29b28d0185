"""Imports point one way: data -> dust -> grpo, rank_prompt, sandbox -> plumbing. Imports inside functions count too.

A reader of the paper finds the whole method in the four files at the top level. An import in the other direction would
make all files depend on each other again. Once the sandbox imported the micro-lab, and with it torch.
"""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {  # which of our parts each part may import
    "data": {"data", "dust", "grpo", "rank_prompt", "sandbox", "plumbing"},
    "dust": {"grpo", "rank_prompt", "sandbox", "plumbing"},
    "grpo": {"plumbing"},
    "rank_prompt": set(),
    "sandbox": {"plumbing"},
    "plumbing": {"plumbing"},
}
WITHOUT_TORCH = {"rank_prompt", "sandbox"}


def offences(root: Path) -> set[str]:
    """Return "FILE imports NAME" for each forbidden import, and "FILE" for each file that is not in MAY_IMPORT."""
    found = set()
    for path in [*root.glob("*.py"), *root.glob("plumbing/*.py"), *root.glob("data/*.py")]:
        file = path.relative_to(root)
        part = file.parts[0].removesuffix(".py")
        if part not in MAY_IMPORT:
            found.add(str(file))
            continue
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
        forbidden = (MAY_IMPORT.keys() - MAY_IMPORT[part]) | ({"torch"} if part in WITHOUT_TORCH else set())
        found |= {f"{file} imports {name}" for name in names & forbidden}
    return found


def test_no_import_points_back():
    assert offences(ROOT) == set()


@pytest.mark.parametrize("file, line, name", [
    ("plumbing/runs.py", "from rank_prompt import ndcg", "rank_prompt"), ("dust.py", "import data", "data"),
    ("grpo.py", "def f():\n    from data.make_tiny import LINES", "data"), ("sandbox.py", "import sys, grpo", "grpo"),
    ("sandbox.py", "def f():\n    import torch.nn", "torch"),
    ("rank_prompt.py", "import plumbing.models as models", "plumbing"),
])
def test_an_import_that_points_back_is_found(file, line, name, tmp_path):
    """The test above would also pass if `offences` read no files at all."""
    (tmp_path / "plumbing").mkdir()
    (tmp_path / "plumbing" / "problems.py").write_text("from . import ranks\nfrom plumbing import models")
    assert offences(tmp_path) == set()
    (tmp_path / file).write_text(line)
    (tmp_path / "more.py").write_text("import torch")
    assert offences(tmp_path) == {f"{file} imports {name}", "more.py"}


def test_prompts_sandbox_and_problems_load_without_torch():
    """Importing torch takes seconds. A reader who tries a prompt must not wait, nor a process that runs candidates."""
    code = "import sys, rank_prompt, sandbox, plumbing.problems; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_the_list_of_the_plumbing_names_each_of_its_files():
    """A reader looks there for what a file is for. A list that lacks one or names a gone one misleads."""
    listed = re.findall(r"^    (\w+\.py) ", (ROOT / "plumbing" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted([*listed, "__init__.py"]) == sorted(path.name for path in (ROOT / "plumbing").glob("*.py"))
