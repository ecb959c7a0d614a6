"""House rules of the source tree, read from the syntax trees: nothing of ours is imported or run.

Import order: the rooms of ig_jax stand in a row, and a file imports from its own room and from
those before it, nothing else of ours. That keeps the method free of files, devices and flags. An
import inside a function counts like any other. Every rule returns one line per offence: its place
and the fix.
"""

import ast
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
from places import ROOT

# A room is a folder of ig_jax or a file at its root.
ROOMS = (
    # Words and files.
    *("types", "errors", "bounds", "pytree", "io", "plots"),
    # Mathematics; knows no config.
    *("prng", "diffusion", "models", "guidance", "samplers", "optim", "objectives"),
    # What a run is made of.
    *("codecs", "data", "metrics", "monitoring", "parallel", "interop", "search", "checkpoint"),
    *("config", "generation", "pipeline", "experiment"),
    # What a run does.
    *("evaluation", "training", "study", "programs", "api", "modes", "cli"),
)
# Below these nobody sees a ConfigDict.
CONFIG = ROOMS.index("config")
# Programs import each other for nothing; these hold what several of them share.
SHARED_BY_PROGRAMS = {
    f"ig_jax.programs.{name}" for name in ("run_record", "guide_model", "memory_check")
}


def python_files(root: Path, *places: str) -> list[Path]:
    """The files among the places and those in the folders among them; a missing place has none."""
    paths = [root / place for place in places]
    inside = [file for path in paths for file in path.rglob("*.py")]
    return sorted(inside + [path for path in paths if path.is_file()])


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full dotted name of everything imported; relative names keep their leading dots."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (f"{node.module}." if node.module else "")
            found += [(node.lineno, prefix + alias.name) for alias in node.names]
    return found


def is_within(dotted: str, package: str) -> bool:
    return dotted == package or dotted.startswith(package + ".")


def module_name(path: Path, root: Path) -> str:
    """`ig_jax/data/npy.py` -> `ig_jax.data.npy`, `ig_jax/data/__init__.py` -> `ig_jax.data`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(dotted: str) -> str:
    """The entry in ROOMS: `ig_jax.models.sit.SiT` -> `models`, `ig_jax` -> `__init__`."""
    return dotted.split(".")[1] if "." in dotted else "__init__"


def why_not(importer: str, imported: str) -> str | None:
    """Why the module `importer` may not import this dotted name; None if it may."""
    if imported.startswith("."):
        return f"relative import {imported}: write `from ig_jax import ...`"
    if imported == "ig_jax":
        return "imports ig_jax as a whole: name a module of it"
    if not is_within(imported, "ig_jax"):
        return None
    ours, theirs = room_of(importer), room_of(imported)
    if ours == theirs == "programs" and not any(is_within(imported, m) for m in SHARED_BY_PROGRAMS):
        return f"imports the program {imported}: move what both use to a room before programs"
    if ours == theirs:
        return None
    if theirs not in ROOMS:
        return f"imports {imported}, which is in no room (ROOMS in tests/project/test_layers.py)"
    if ours == "__init__" or ROOMS.index(theirs) > ROOMS.index(ours):
        return f"{ours} imports {imported}: only rooms before it are allowed"
    return None


def imports_that_climb(root: Path) -> list[str]:
    offences = []
    for path in python_files(root, "ig_jax"):
        place, module = path.relative_to(root), module_name(path, root)
        if room_of(module) not in {"__init__", *ROOMS}:
            offences.append(f"{place}: put it in a room (ROOMS in tests/project/test_layers.py)")
            continue
        reasons = ((line, why_not(module, imported)) for line, imported in imports(path))
        offences += [f"{place}:{line}: {reason}" for line, reason in reasons if reason]
    return offences


def crowded_root(root: Path) -> list[str]:
    files = [path for path in python_files(root, "ig_jax") if path.parent == root / "ig_jax"]
    return [f"ig_jax/ holds {len(files)} files: at most 12, use a room"] if len(files) > 12 else []


def banned_imports(root: Path, files: Iterable[Path], *banned: str, fix: str) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: imports {imported}: {fix}"
        for path in files
        for line, imported in imports(path)
        if any(is_within(imported, package) for package in banned)
    ]


def flags_outside_cli(root: Path) -> list[str]:
    files = python_files(root, "ig_jax", "configs", "benchmarks")
    others = [path for path in files if path != root / "ig_jax/cli.py"]
    flags = ("absl.flags", "ml_collections.config_flags")
    return banned_imports(root, others, *flags, fix="only cli.py knows flags")


def config_dicts_before_the_config_room(root: Path) -> list[str]:
    below = [
        path
        for path in python_files(root, "ig_jax")
        if (room := room_of(module_name(path, root))) in ROOMS and ROOMS.index(room) < CONFIG
    ]
    return banned_imports(root, below, "ml_collections", fix="hand in a frozen dataclass")


def tensorflow_or_torch(root: Path) -> list[str]:
    # These two parts of clu import TensorFlow.
    frameworks = ("tensorflow", "torch", "clu.metric_writers", "clu.periodic_actions")
    files = python_files(root, "ig_jax", "configs", "benchmarks", "tests", "main.py")
    # The two files that are about PyTorch, and say so where it is not installed.
    peers = {root / f"benchmarks/torch_{name}.py" for name in ("peer", "network")}
    others = [path for path in files if path not in peers]
    return banned_imports(root, others, *frameworks, fix="the project runs without it")


def files_called_utils(root: Path) -> list[str]:
    files = python_files(root, "ig_jax", "configs", "benchmarks", "tests")
    names = [path.relative_to(root).as_posix() for path in files]
    return [f"{name}: name it after what it holds" for name in names if "utils" in name]


def folders_that_are_no_package(root: Path) -> list[str]:
    folders = {path.parent for path in python_files(root, "ig_jax")}
    bare = sorted(folder for folder in folders if not (folder / "__init__.py").exists())
    return [f"{folder.relative_to(root)}: add __init__.py" for folder in bare]


def modules_never_reached(root: Path) -> list[str]:
    """Dead code: modules that neither main.py nor the Python API needs, directly or not."""
    modules = {module_name(path, root): path for path in python_files(root, "ig_jax")}
    waiting = [path for path in (root / "main.py", root / "ig_jax/api.py") if path.exists()]
    reached = {"ig_jax", "ig_jax.api"}
    while waiting:
        for _, imported in imports(waiting.pop()):
            words = imported.split(".")
            # `from a.b import c` runs a and a.b too, and c may be a module or a name in one.
            names = {".".join(words[:end]) for end in range(1, len(words) + 1)}
            new = names & modules.keys() - reached
            reached |= new
            waiting += [modules[name] for name in new]
    unreached = sorted(modules.keys() - reached)
    return [f"{modules[m].relative_to(root)}: import it somewhere or remove it" for m in unreached]


RULES = [
    imports_that_climb,
    crowded_root,
    flags_outside_cli,
    config_dicts_before_the_config_room,
    tensorflow_or_torch,
    files_called_utils,
    folders_that_are_no_package,
    modules_never_reached,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_project_has_no(rule):
    assert rule(ROOT) == []


# The smallest tree with a lawful import of every kind.
LAWFUL = {
    "main.py": "from ig_jax import cli\n",
    "ig_jax/__init__.py": "",
    "ig_jax/types.py": "import jax\nfrom collections.abc import Mapping\n",
    "ig_jax/models/__init__.py": "from ig_jax.models import sit\n",
    "ig_jax/models/sit.py": "from ig_jax.types import Latents, Times\nfrom clu import platform\n",
    "ig_jax/guidance.py": "import ig_jax.models.sit as net\nfrom ig_jax import types as words\n",
    "ig_jax/config/__init__.py": "",
    "ig_jax/config/run_config.py": "import ml_collections\n",
    "ig_jax/experiment.py": "from ig_jax import guidance\nfrom ig_jax.config import run_config\n",
    "ig_jax/programs/__init__.py": "",
    "ig_jax/programs/run_record.py": "",
    "ig_jax/programs/sample.py": "def main():\n    from ig_jax import experiment\n"
    "    from ig_jax.programs import run_record\n",
    "ig_jax/cli.py": "from absl import app, flags\nfrom ig_jax.programs import sample\n",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source, encoding="utf-8")


@pytest.mark.parametrize("rule", RULES)
def test_a_lawful_tree_has_no(rule, tmp_path):
    plant(tmp_path, LAWFUL)
    assert rule(tmp_path) == []


MODEL, PROGRAM = "ig_jax/models/sit.py", "ig_jax/programs/sample.py"
IMPORT_OFFENDERS = [
    (MODEL, "import ig_jax.guidance", "models imports ig_jax.guidance: only rooms before it"),
    (MODEL, "import jax, ig_jax.guidance as g", "models imports ig_jax.guidance: only rooms"),
    (MODEL, "from ig_jax import types, experiment", "models imports ig_jax.experiment: only"),
    (MODEL, "from . import layers", "relative import .layers: write `from ig_jax"),
    (MODEL, "from ..types import Latents", "relative import ..types.Latents: write"),
    ("ig_jax/guidance.py", "def f():\n    from ig_jax import config", ":2: guidance imports"),
    ("ig_jax/guidance.py", "if TYPE_CHECKING:\n    import ig_jax.cli", ":2: guidance imports"),
    ("ig_jax/config/run_config.py", "from ig_jax import experiment", "config imports ig_jax.exp"),
    ("ig_jax/types.py", "from ig_jax import errors", "types imports ig_jax.errors: only rooms"),
    ("ig_jax/__init__.py", "import ig_jax.types", "__init__ imports ig_jax.types: only rooms"),
    (PROGRAM, "from ig_jax.programs import evaluate", "imports the program ig_jax.programs.ev"),
    (PROGRAM, "from ig_jax.programs.evaluate import run", "imports the program ig_jax.programs.ev"),
    ("ig_jax/experiment.py", "import ig_jax", "imports ig_jax as a whole"),
    ("ig_jax/experiment.py", "from ig_jax import *", "imports ig_jax.*, which is in no room"),
    (
        "ig_jax/experiment.py",
        "from ig_jax.extra import x",
        "imports ig_jax.extra.x, which",
    ),
    ("ig_jax/extra.py", "", "put it in a room"),
    ("ig_jax/extra/deep/x.py", "", "put it in a room"),
]
OTHER_OFFENDERS = [
    (flags_outside_cli, PROGRAM, "from absl import app, flags", "imports absl.flags"),
    (flags_outside_cli, "configs/a.py", "import absl.flags as f", "imports absl.flags"),
    (flags_outside_cli, PROGRAM, "from ml_collections import config_flags", "only cli.py"),
    (config_dicts_before_the_config_room, MODEL, "import ml_collections", "frozen dataclass"),
    (
        tensorflow_or_torch,
        "tests/test_a.py",
        "def f():\n    import torch.nn",
        ":2: imports torch.nn",
    ),
    (tensorflow_or_torch, "main.py", "from tensorflow import io", "imports tensorflow.io"),
    (tensorflow_or_torch, "benchmarks/train.py", "import torch", "imports torch"),
    (tensorflow_or_torch, MODEL, "from clu import metric_writers", "imports clu.metric_writers"),
    (tensorflow_or_torch, MODEL, "from clu.periodic_actions import x", "imports clu.periodic"),
    (files_called_utils, "ig_jax/data/utils.py", "", "name it after what it holds"),
    (files_called_utils, "tests/test_utils.py", "", "name it after what it holds"),
    (folders_that_are_no_package, "ig_jax/data/digits.py", "", "ig_jax/data: add __init__.py"),
    (modules_never_reached, "ig_jax/models/dit.py", "import ig_jax.cli", "or remove it"),
]


@pytest.mark.parametrize(
    ("rule", "name", "source", "expected"),
    [(imports_that_climb, *offender) for offender in IMPORT_OFFENDERS] + OTHER_OFFENDERS,
)
def test_a_planted_offender_is_the_one_line_listed(tmp_path, rule, name, source, expected):
    plant(tmp_path, LAWFUL | {name: source})
    (offence,) = rule(tmp_path)
    assert expected in offence


def test_a_thirteenth_file_at_the_root_is_one_too_many(tmp_path):
    names = [f"ig_jax/module_{n}.py" for n in range(12)]
    plant(tmp_path, dict.fromkeys(names, ""))
    assert crowded_root(tmp_path) == []
    plant(tmp_path, {"ig_jax/__init__.py": ""})
    assert crowded_root(tmp_path) == ["ig_jax/ holds 13 files: at most 12, use a room"]


def test_a_name_that_only_begins_like_a_banned_one_is_allowed(tmp_path):
    plant(tmp_path, LAWFUL | {MODEL: "import torchless\nimport tensorflow_free.torch\n"})
    assert tensorflow_or_torch(tmp_path) == []
