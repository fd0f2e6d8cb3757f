"""The commit and the machine that stand beside measured numbers."""

import subprocess

import pytest

from dalle2_video import provenance
from tests.helpers.launching import ROOT


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_checkout_wherever_it_is_asked_for(tmp_path, monkeypatch) -> None:
    if not (full := git("rev-parse", "HEAD")):
        pytest.skip("no git checkout")
    monkeypatch.chdir(tmp_path)
    found = provenance.commit()
    assert full.startswith(found.removesuffix("+")) and len(found) >= 7
    assert found.endswith("+") == bool(git("diff", "HEAD", "--name-only"))


def test_outside_git_the_commit_is_unknown(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.commit() == "unknown"
