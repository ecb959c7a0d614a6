"""Mutated configs through the path of --dry_run: each is described, or refused in one sentence.

  python tests/helpers/fuzz_configs.py --num=10000 --seed=0

Every config of configs/, with its variants, is changed in one to three places: a value or a whole
section becomes something hostile, goes missing, moves, or changes places with another. A tenth of
the changes are made on the command line. What fails is printed with the changes that made it; any
exception but the project's own fails, and so does a config that takes long, or memory that grows.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import io
import math
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from places import ROOT

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from absl.testing import flagsaver
from ml_collections import ConfigDict

from ig_jax import cli, experiment, modes
from ig_jax.config import run_config
from ig_jax.config.run_config import Config
from ig_jax.errors import UserError
from ig_jax.programs import memory_check
from ig_jax.programs.dry_run import describe

SECONDS = 120.0  # for one config; 30 times what one takes, because a machine may be busy
GROWTH = 4 * 2**30  # bytes of resident memory, over all configs
LONGEST = 1200  # characters of a refusal

SMALL = ("digits", "digits:lightningdit", "digits:accelerated", "digits:dit", "tree")
ALL = (
    *SMALL,
    *("sit_b", "sit_l", "sit_xl", "sit_xl:no_data", "sit_xl:image_folder", "sit_xl:npy_folder"),
    *("sit_xl:array_record", "sit_xl:tfds_images", "dit_xl", "lightningdit_b", "lightningdit_l"),
    *("lightningdit_xl", "lightningdit_xl:no_cfg", "lightningdit_xl:safetensors_shards"),
)

NUMBERS = (
    *(math.nan, math.inf, -math.inf, 0, -0.0, 1, 2, 3, 5, 7, 64, 1000, -1, -2.5, 0.5, 0.3, 1.0),
    *(1e-320, 1e-30, 1e-9, 1 - 1e-12, 1e5, 3e6, 1e9, 1e30, 1e37, 1e300, 1.7976931348623157e308),
    *(100_000, 3_000_000, 2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63, 10**20, 10**30, 10**400),
    *(-(2**31), -(2**63), -(10**400), True, False),
    *(np.float32(1.5), np.float64("nan"), np.int64(3), np.bool_(True), np.float16("inf"), 1j),
)
TEXTS = (
    *("", " ", "sit", "heun", "dopri5", "muon", "float16", "random", "0,1,2", "9" * 5000, "-1"),
    *("x" * 300, "x/" * 3000, "y" * 100_000, "a\0b", "\n", "a\nb", "\ud800", "\udcff", "ünï ☃"),
    *("../../..", "~", "$HOME", "/", "/dev/zero", "/proc/self/mem", "gs://bucket/x", "{}", "%s"),
)
OTHERS = (
    *(None, {}, [], (), [1, "a", None], (math.nan,), (1, 2, 3), (0,) * 5000, [[[]]], {"name": {}}),
    *({"name": "sit"}, {"name": ["sit"]}, {"a": {"b": {"c": 1}}}, {"": 1}, {"a b\n": 1}, {1: 2}),
    *(b"bytes", object(), len, range(3), {1, 2}, np.arange(3), np.zeros((2, 2)), ConfigDict()),
)
HOSTILE = (*NUMBERS, *NUMBERS, *TEXTS, *OTHERS)  # numbers are where most rules are


@dataclass(frozen=True)
class Failure:
    base: str
    changes: list[str]
    what: str

    def __str__(self) -> str:
        return f"{self.base}: {'; '.join(self.changes)}\n    {self.what}"


@cache
def values_of(base: str) -> dict[str, Any]:
    module, *variant = base.split(":")
    return importlib.import_module(f"configs.{module}").get_config(*variant).to_dict()


def places(section: dict, path: tuple = ()) -> Iterator[tuple]:
    """Of every value and every section below."""
    for name, value in section.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from places(value, (*path, name))


def _holder(values: dict, place: tuple) -> dict:
    for name in place[:-1]:
        values = values[name]
    return values


def _get(values: dict, place: tuple) -> Any:
    return _holder(values, place)[place[-1]]


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**50 else "a large int"
    return text if len(text) < 60 else f"{text[:60]}..."


def mutate(rng: random.Random, values: dict) -> str:
    """Changes `values` in one place; says how."""
    known = list(places(values))
    leaves = [p for p in known if not isinstance(_get(values, p), dict)]
    # Mostly leaves: a section that is replaced hides all the rules below it.
    place = rng.choice(leaves if rng.random() < 0.85 and leaves else known)
    other = rng.choice(known)
    name, holder, dotted = place[-1], _holder(values, place), ".".join(map(str, place))
    kind = rng.choices(
        ("hostile", "scaled", "taken", "gone", "added", "swapped", "listed"),
        (50, 12, 12, 6, 6, 6, 8),
    )[0]
    old = holder[name]
    if kind == "hostile":
        holder[name] = rng.choice(HOSTILE)
    elif kind == "scaled" and isinstance(old, int | float):
        holder[name] = type(old)(old * rng.choice((-1, 2, 3, 10, 1000, 10**6, 2**40)))
    elif kind == "taken":
        holder[name] = copy.deepcopy(_get(values, other))
    elif kind == "gone":
        del holder[name]
        return f"{dotted} is gone"
    elif kind == "added":
        _holder(values, other)[f"{name}{rng.choice(('', '_', '2'))}"] = copy.deepcopy(old)
        return f"{dotted} once more beside {'.'.join(map(str, other))}"
    elif kind == "swapped":
        moved = copy.deepcopy(_get(values, other))
        _holder(values, other)[other[-1]] = copy.deepcopy(old)
        with contextlib.suppress(KeyError, TypeError):  # one lay in the other
            _holder(values, place)[name] = moved
        return f"{dotted} and {'.'.join(map(str, other))} change places"
    elif kind == "listed":
        holder[name] = tuple(rng.choice((old, *NUMBERS)) for _ in range(rng.choice((1, 2, 40))))
    return f"{dotted} = {_short(holder[name])}"


_described: set[str] = set()


def dry_run(settings: ConfigDict, most: int) -> None:
    """As `run.run(settings, dry_run=True)`, but what is described the same way only once.

    After `most` descriptions nothing is described.
    """
    parsed = run_config.parse(settings, devices=jax.device_count())
    exp = experiment.experiment(parsed)
    key = _seen_by_describe(parsed)
    if key in _described or len(_described) >= most:
        return
    text = describe(exp)
    assert "training:" in text and "sampling:" in text
    for mode in modes.MODES:
        memory_check.shortage(exp, mode)
    _described.add(key)


@cache
def _plain_parts() -> dict[str, Any]:
    parsed = run_config.parse(ConfigDict(values_of("digits")))
    names = (
        *("checkpoint", "log", "evaluate", "search", "prepare", "profile", "visualize", "probe"),
        "raw",
    )
    return {name: getattr(parsed, name) for name in names}


def _seen_by_describe(parsed: Config) -> str:
    names = {part: parsed.raw[part]["name"] for part in ("model", "optim")}
    return f"{names} {replace(parsed, **_plain_parts())}"


def on_command_line(rng: random.Random, base: str) -> list[str]:
    """Arguments of main.py that change the config."""
    module, _, variant = base.partition(":")
    known = list(places(values_of(base)))
    arguments = [f"--config={ROOT}/configs/{module}.py" + (f":{variant}" if variant else "")]
    for _ in range(rng.choice((1, 1, 2))):
        place = ".".join(rng.choice(known))
        value = rng.choice(HOSTILE)
        text = value if isinstance(value, str) else _short(value)
        text = (
            text.replace("\0", "")
            .encode("utf-8", "surrogateescape" if "\udcff" in text else "replace")
            .decode("utf-8", "surrogateescape")
        )
        ending = rng.choice(("", "", "", "", ".x", "[0]", "x"))
        arguments.append(f"--config.{place}{ending}={text}")
    return arguments


def parse_command_line(arguments: list[str]) -> ConfigDict:
    """As main.py does.

    Raises:
      UserError: what it says before it ends.
    """
    said, before = io.StringIO(), sys.argv
    sys.argv = ["main.py", *arguments]
    try:
        with flagsaver.flagsaver(), contextlib.redirect_stderr(said):
            cli.parse_flags(sys.argv)
            return copy.deepcopy(cli.FLAGS.config)
    except SystemExit as end:
        text = said.getvalue()
        assert end.code == 2 and text.startswith("error: "), (end.code, text)
        raise UserError(text.removesuffix("\n")) from None
    finally:
        sys.argv = before


def attempt(rng: random.Random, bases: tuple[str, ...], most: int) -> Failure | None:
    """One mutated config; what is wrong with how it is taken."""
    base = rng.choice(bases)
    if rng.random() < 0.1:
        changes = on_command_line(rng, base)

        def work() -> None:
            dry_run(parse_command_line(changes), most)

    else:
        values = copy.deepcopy(values_of(base))
        changes = [mutate(rng, values) for _ in range(rng.choices((1, 2, 3), (6, 3, 1))[0])]
        try:
            settings = ConfigDict(values)
        except Exception:
            return None  # no config file can come to this

        def work() -> None:
            dry_run(settings, most)

    started = time.perf_counter()
    try:
        work()
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > LONGEST or "Traceback" in text or not text.isprintable():
            return Failure(base, changes, f"not one short sentence: {text[:2000]!r}")
    except Exception as error:
        return Failure(base, changes, f"{type(error).__name__}: {str(error)[:500]}{_where(error)}")
    seconds = time.perf_counter() - started
    return Failure(base, changes, f"took {seconds:.0f} s") if seconds > SECONDS else None


def _where(error: BaseException) -> str:
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename]
    return "".join(f"\n      {Path(f.filename).name}:{f.lineno} {f.line}" for f in frames[-4:])


def resident() -> int:
    """Most bytes of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(
    num: int, seed: int, bases: tuple[str, ...], *, described: int = 10**9, tell: bool = False
) -> list[Failure]:
    """`num` mutated configs, the same for the same seed; at most so many are described."""
    if not cli.FLAGS.is_parsed():
        cli.FLAGS(["main.py"])
    _described.clear()
    failures, begun = [], resident()
    for number in range(num):
        failure = attempt(random.Random(f"{seed}/{number}"), bases, described)
        if failure:
            failures.append(failure)
        if tell and (failure or number % 500 == 499):
            print(f"{number + 1}: {failure or f'{len(failures)} failures'}", flush=True)
    grown = resident() - begun
    if grown > GROWTH:
        failures.append(Failure("memory", [], f"grew by {grown / 2**20:,.0f} MiB"))
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    # What would ask for more than there is fails here, and not the machine.
    soft = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (soft + 16 * 2**30, resource.RLIM_INFINITY))
    start = time.perf_counter()
    found = fuzz(given.num, given.seed, ALL, tell=True)
    print(
        f"{given.num} configs, {len(_described)} different ones described, {len(found)} failures, "
        f"{time.perf_counter() - start:.0f} s, at most {resident() / 2**20:,.0f} MiB"
    )
    sys.exit(bool(found))
