"""The README's Python runs and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    logits = names["logits"].numpy()
    assert logits.shape == (1, 1, names["model"].config.vocab_size)
    assert {"olleh", "HELLO"} <= set(capsys.readouterr().out.splitlines())


def test_links_exist():
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "examples/toy/README.md"]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_commands_are_there():
    blocks = re.findall(r"<!-- ci -->\n```console\n\$ (.*?)\n```", TEXT)
    assert len(blocks) == 2
    assert "phi3c generate" in blocks[0] and "pytest" in blocks[1]
