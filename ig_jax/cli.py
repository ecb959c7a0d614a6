"""The command line: flags, and one sentence for every mistake.

  python main.py --config=configs/digits.py [--workdir=runs/digits] [--dry_run]
                 [--mode=train|sample|evaluate|reference|search|prepare|visualize|probe|demo|
                         study|select]
                 [--config.train.steps=1000 ...] [--init_from=WORKDIR[@STEP]]
                 [--coordinator=host:port --num_processes=N --process_id=i]

  python main.py --mode=import --checkpoint=FILE --workdir=DIR [--readout_depth=8] [--family=sit]
                 [--num_heads=16] [--num_classes=1000] [--time_direction=noise_to_data]
                 [--path=linear] [--prediction=velocity] [--part=ema] [--training_state]
  python main.py --mode=export --workdir=DIR --output=FILE.safetensors [--weights=ema]
  python main.py --mode=compare --runs=DIR,DIR,... --workdir=DIR

Running the same command again resumes. Installed with pip, the program is called ig-jax.
"""

from __future__ import annotations

import gc

# Imports and tracing make many objects that stay: looking for garbage among them as often as Python
# does by itself takes a tenth of the time to the first step.
gc.set_threshold(100_000, 20, 10)

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags

import configs
from configs import published
from configs import workdir as recorded
from ig_jax import modes
from ig_jax.checkpoint import run_file
from ig_jax.config import kinds
from ig_jax.errors import UserError
from ig_jax.io import compilation_cache, paths
from ig_jax.monitoring import console, library_logs
from ig_jax.parallel import distributed
from ig_jax.parallel.preemption import Stopped

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "The run: a file of configs/.", lock_config=True)
flags.DEFINE_string("workdir", None, "Where everything is written; runs/<config> if not given.")
flags.DEFINE_enum("mode", "train", [*modes.MODES, *modes.WITHOUT_CONFIG], "What to do.")
flags.DEFINE_string("checkpoint", None, "import: a file of published weights, whatever its suffix.")
flags.DEFINE_integer("readout_depth", None, "import: where its intermediate head reads, from 1.")
flags.DEFINE_string("family", None, "import: sit, dit or lightningdit, where names leave it open.")
flags.DEFINE_integer("num_heads", None, "import: heads of attention, where the file does not say.")
flags.DEFINE_integer(
    "num_classes", None, "import: classes, without the null class if there is one."
)
flags.DEFINE_string("time_direction", None, "import: noise_to_data or data_to_noise, from 0 to 1.")
flags.DEFINE_string("path", None, "import: linear, cosine or vp; linear if not given.")
flags.DEFINE_string("prediction", None, "import: velocity, noise or score; velocity if not given.")
flags.DEFINE_string("part", "", "import: which of several networks in the file.")
flags.DEFINE_bool("training_state", False, "import: also what its training goes on from.")
flags.DEFINE_string("output", None, "export: the .safetensors file to write.")
flags.DEFINE_string("weights", "ema", "export: ema (the first decay), raw, or a decay.")
flags.DEFINE_string("runs", None, "compare: workdirs of runs, with commas between.")
flags.DEFINE_string(
    "init_from",
    None,
    "train, demo: start from the weights of another run, WORKDIR or WORKDIR@STEP.",
)
flags.DEFINE_bool("dry_run", False, "Only parse, build and describe; nothing is computed.")
flags.DEFINE_bool(
    "help_fields", False, "Lists the kinds of sources, samplers, ... and their fields."
)
flags.DEFINE_string("coordinator", None, "Several processes: host:port on which process 0 listens.")
flags.DEFINE_integer("num_processes", None, "Several processes: how many, on all hosts together.")
flags.DEFINE_integer("process_id", None, "Several processes: which one this is, from 0.")


def fail(message: str, status: int = 2) -> None:
    """Says one sentence and ends."""
    sys.stderr.write(f"error: {message}\n")
    distributed.leave(status)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parsing, with every mistake reported in one sentence."""
    try:
        choices, words = kinds.chosen([_expanded(word) for word in _with_config(argv)])
        with _command_line(words):
            rest = FLAGS(words)
        getattr(FLAGS.config, "to_dict", None)  # a file that failed to load says so only when used
    except Exception as error:  # the flags and the config file raise a dozen kinds
        fail(str(error) if isinstance(error, UserError) else modes.explain_flags(error, argv))
    if len(rest) > 1:
        fail(f"{rest[1]!r} is not a flag: write --config.field=value or --mode=...")
    if FLAGS.config is None and FLAGS.mode not in modes.WITHOUT_CONFIG:
        if not FLAGS["config"].present:
            fail("--config is missing: name a file, such as --config=configs/digits.py")
        fail(f"--config={FLAGS['config'].config_filename}: its get_config() returns nothing")
    if not isinstance(FLAGS.config, ConfigDict | None):
        location, kind = FLAGS["config"].config_filename, type(FLAGS.config).__name__
        fail(f"--config={location}: its get_config() returns a {kind}, must return a ConfigDict")
    for choice in choices:
        if FLAGS.config is None:
            fail(
                f"--config.{choice.section}.name: --mode={FLAGS.mode} takes no config; leave it out"
            )
        try:
            choice.apply(FLAGS.config)
        except UserError as error:
            fail(str(error))
    return rest


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """ml_collections looks for --config.field=value in `sys.argv`, not in what absl is given."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def _with_config(argv: list[str]) -> list[str]:
    """The command line, with the config that its workdir holds where it names none."""
    workdir, mode = _given(argv, "workdir"), _given(argv, "mode")
    if not workdir or mode in modes.WITHOUT_CONFIG or _given(argv, "config") is not None:
        return argv
    folder = Path(paths.given(workdir, "--workdir"))
    places = {
        folder / run_file.FILE: f"{recorded.__file__}:{folder}",
        folder / "config.py": str(folder / "config.py"),  # what --mode=import wrote
    }
    found = [location for file, location in places.items() if file.exists()]
    return [argv[0], f"--config={found[0]}", *argv[1:]] if found else argv


def _given(argv: list[str], flag: str) -> str | None:
    """What a command line says of a flag, before absl reads it."""
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in (f"--{flag}", f"-{flag}"):
            return value if equals else following
    return None


def _expanded(word: str) -> str:
    """The config file is read while flags are parsed: its path is expanded before."""
    flag, _, path = word.partition("=")
    return f"{flag}={_installed(paths.given(path, flag))}" if flag == "--config" and path else word


def _installed(location: str) -> str:
    """configs/digits.py from any folder: the installed one, where the folder has none."""
    file, colon, variant = location.partition(":")
    beside = Path(configs.__file__).parent.parent / file
    if os.path.exists(file) or Path(file).parent != Path("configs") or not beside.exists():
        return location
    return f"{beside}{colon}{variant}"


def keep_programs() -> None:
    """Lets the next command find what this one compiles; a job of several processes has no part.

    One of its processes could find a program that the others must compile together with it.
    """
    why_not = None if distributed.several() else compilation_cache.keep_programs()
    if why_not:
        console.say(f"compiled programs are not kept for the next command: {why_not}")


def run_without_config() -> None:
    """--mode=import, export and compare."""
    needed = {
        "import": ("checkpoint", "workdir"),
        "export": ("workdir", "output"),
        "compare": ("runs", "workdir"),
    }[FLAGS.mode]
    for flag in needed:
        if FLAGS[flag].value is None:
            fail(f"--{flag} is missing: --mode={FLAGS.mode} needs {' and '.join(needed)}")
    if FLAGS.mode == "compare":
        return modes.compare_runs(FLAGS.runs, FLAGS.workdir)
    if FLAGS.mode == "export":
        return modes.export_run(FLAGS.workdir, FLAGS.output, FLAGS.weights)
    return modes.import_file(
        *(FLAGS.checkpoint, FLAGS.workdir, published.bases()),
        **{flag: FLAGS[flag].value for flag in modes.DECLARED},
        part=FLAGS.part,
        training_state=FLAGS.training_state,
    )


def main(argv: list[str], started: float | None = None) -> None:
    """Runs what the parsed flags say.

    Args:
      argv: of absl; not used.
      started: `time.perf_counter()` before the imports, which the demo reports.
    """
    del argv
    if not FLAGS["verbosity"].present:
        library_logs.silence()
    import_seconds = 0.0 if started is None else time.perf_counter() - started
    try:
        if FLAGS.mode in modes.WITHOUT_CONFIG:
            keep_programs()
            return run_without_config()
        if FLAGS.mode == "prepare" and FLAGS.workdir is None:
            fail("--workdir is missing: --mode=prepare writes the data set there")
        distributed.start({flag: FLAGS[flag].value for flag in distributed.VARIABLES})
        keep_programs()
        location = FLAGS["config"].config_filename
        modes.run(
            FLAGS.config,
            workdir=modes.default_workdir(location) if FLAGS.workdir is None else FLAGS.workdir,
            mode=FLAGS.mode,
            dry_run=FLAGS.dry_run,
            init_from=FLAGS.init_from,
            import_seconds=import_seconds,
        )
    except UserError as error:
        fail(str(error))
    except Stopped:
        return  # as it was asked to; training has said so
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted: run the same command again to go on\n")
        distributed.leave(130)  # what shells expect of a program ended by Ctrl-C
    except Exception as error:
        if not distributed.several():
            raise
        if distributed.is_loss(error):
            fail(distributed.lost(str(error).split("\n")[0]), distributed.LOST)
        traceback.print_exc()
        distributed.leave(1)


def entry(started: float | None = None) -> None:
    """The program, with the command line of this process."""
    if {"--help", "-h", "-help"} & set(sys.argv[1:]):
        sys.stdout.write(f"{__doc__}{FLAGS.module_help(sys.modules[__name__])}\n")
        return
    if "--help_fields" in sys.argv[1:]:
        sys.stdout.write(kinds.described())
        return
    app.run(lambda argv: main(argv, started), flags_parser=parse_flags)
