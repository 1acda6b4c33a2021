"""One run of the command ``mmtok`` within the process, for the tests of its commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmtok.cli import main


def run(*arguments: object, capsys: pytest.CaptureFixture) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def refused(*arguments: object, capsys: pytest.CaptureFixture, code: int = 2) -> str:
    """The only line of a run that must fail with this exit code, which is on stderr."""
    got, stdout, stderr = run(*arguments, capsys=capsys)
    assert (got, stdout) == (code, ""), stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("mmtok: ")
    return stderr


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a directory."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
