"""Runs command lines of main.py one after the other, with what they import imported once.

Each is a process of its own, forked before JAX has started anything, so it is what a shell would
have run but for the seconds of importing.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(commands: list[list[str]], cwd: Path) -> list[tuple[int, str, str]]:
    """(exit status, standard output, standard error) of every command, up to the first that fails.

    A command is what follows `python main.py`; files of configs/ are those of this repository.
    """
    import subprocess

    with tempfile.TemporaryDirectory() as folder:
        lines = "\0".join("\n".join(words) for words in commands)
        (Path(folder) / "commands").write_text(lines)
        done = subprocess.run(
            [sys.executable, __file__, folder], cwd=cwd, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        results = []
        for number in range(len(commands)):
            files = [Path(folder) / f"{number}.{kind}" for kind in ("status", "out", "err")]
            if files[0].exists():
                status, out, err = (file.read_text() for file in files)
                results.append((int(status), out, err))
        return results


def become(command: list[str], folder: Path, number: int) -> None:
    """Ends as main.py does."""
    from absl import app

    import main

    for kind, stream in (("out", 1), ("err", 2)):
        file = os.open(folder / f"{number}.{kind}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
    sys.argv = ["main.py", *command]
    app.run(main.main, flags_parser=main.parse_flags)


def _serve(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    import main  # noqa: F401, before the first fork

    lines = (folder / "commands").read_text()
    for number, line in enumerate(lines.split("\0")):
        child = os.fork()
        if not child:
            become(line.split("\n"), folder, number)
        _, ended = os.waitpid(child, 0)
        status = os.waitstatus_to_exitcode(ended)
        (folder / f"{number}.status").write_text(str(status))
        if status:
            break


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
