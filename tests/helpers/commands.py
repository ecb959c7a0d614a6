"""Command lines of main.py: each in a process of its own, or in this one.

Those that `run` runs one after the other are forked before JAX has started anything, so that each
is what a shell would have run but for the seconds of importing.
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


def run_here(command: list[str], monkeypatch) -> int:
    """Runs one in this process, from the root of the repository; its exit status."""
    from absl.testing import flagsaver

    from ig_jax import cli

    # ml_collections looks for --config.field=value here, not in what absl is given.
    monkeypatch.setattr(sys, "argv", ["main.py", *command])
    monkeypatch.chdir(ROOT)
    with flagsaver.flagsaver():
        try:
            cli.main(cli.parse_flags(sys.argv))
        except SystemExit as end:
            return end.code
    return 0


def become(command: list[str], folder: Path, number: int) -> None:
    """Ends as main.py does."""
    from absl import app

    from ig_jax import cli

    for kind, stream in (("out", 1), ("err", 2)):
        file = os.open(folder / f"{number}.{kind}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, stream)
    sys.argv = ["main.py", *command]
    app.run(cli.main, flags_parser=cli.parse_flags)


def _serve(folder: Path) -> None:
    sys.path.insert(0, str(ROOT))
    from ig_jax import cli  # noqa: F401, before the first fork

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
