"""House rules of the source tree, read from the syntax trees: nothing of ours is imported or run.

Import order: a file of ig_jax imports modules of a smaller layer or of its own package, nothing
else of ours. That keeps the method (layer 2) free of files, devices and flags. An import inside a
function counts like any other. Every rule returns one line per offence: its place and the mend.
"""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PROGRAMS = {
    *("train", "sample", "evaluate", "demo", "run", "preview", "describe"),
    *("search", "density", "guide"),
    *("prepare", "encode", "probe", "visualize", "importing", "exporting"),
    *("stopping", "meters", "replay", "resume", "memory"),
    *("sample_files", "drawing", "look", "judge", "measures", "reference"),
}
LAYERS = (
    # The root __init__ runs before every other module, so it may import none of them.
    {
        "__init__",
        "types",
        "errors",
        "prng",
        "tree",
        "logs",
        "formats",
        "figures",
        "chips",
        "bounds",
        "paths",
        "storage",
        "heap",
        "chatter",
    },
    {"models", "diffusion", "codecs", "data", "metrics", "optim", "ema"},
    {"guidance", "objectives", "samplers", "flops"},
    {
        "sharding",
        "checkpoint",
        "compatible",
        "interop",
        "pictures",
        "panel",
        "halving",
        "sections",
        "distributed",
        "lock",
    },
    {"settings", "config", "build"},
    PROGRAMS,
)
LAYER_OF = {unit: number for number, units in enumerate(LAYERS) for unit in units}
PEERS_ALLOWED = {
    "prng": {"types"},
    "tree": {"errors"},
    "formats": {"errors"},
    "storage": {"errors"},
    "chatter": {"storage"},
    "paths": {"errors"},
    "logs": {"errors", "formats", "storage"},
    "lock": {"sharding"},
    "checkpoint": {"compatible", "sharding"},
    "config": {"settings"},
    "build": {"config"},
} | {program: PROGRAMS for program in PROGRAMS}


def python_files(root: Path, *places: str) -> list[Path]:
    """The files among the places and those in the folders among them; a missing place has none."""
    paths = [root / place for place in places]
    inside = [file for path in paths for file in path.rglob("*.py")]
    return sorted(inside + [path for path in paths if path.is_file()])


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported; relative names keep their leading dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (f"{node.module}." if node.module else "")
            yield from ((node.lineno, prefix + alias.name) for alias in node.names)


def is_within(dotted: str, package: str) -> bool:
    return dotted == package or dotted.startswith(package + ".")


def module_name(path: Path, root: Path) -> str:
    """`ig_jax/data/npy.py` -> `ig_jax.data.npy`, `ig_jax/data/__init__.py` -> `ig_jax.data`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit_of(dotted: str) -> str:
    """The entry in LAYERS: `ig_jax.models.sit.SiT` -> `models`, `ig_jax` -> `__init__`."""
    return dotted.split(".")[1] if "." in dotted else "__init__"


def why_not(importer: str, imported: str) -> str | None:
    """Why a file of the unit `importer` may not import this dotted name; None if it may."""
    if imported.startswith("."):
        return f"relative import {imported}: write `from ig_jax import ...`"
    if imported == "ig_jax":
        return "imports ig_jax as a whole: name a module of it"
    if not is_within(imported, "ig_jax") or unit_of(imported) == importer:
        return None
    if unit_of(imported) not in LAYER_OF:
        return f"imports {imported}, which is in no layer (LAYERS in tests/test_layers.py)"
    mine, theirs = LAYER_OF[importer], LAYER_OF[unit_of(imported)]
    if theirs < mine or unit_of(imported) in PEERS_ALLOWED.get(importer, ()):
        return None
    return f"layer {mine} imports {imported} of layer {theirs}: only smaller layers are allowed"


def imports_that_climb(root: Path) -> list[str]:
    offences = []
    for path in python_files(root, "ig_jax"):
        place, unit = path.relative_to(root), unit_of(module_name(path, root))
        if unit not in LAYER_OF:
            offences.append(f"{place}: put it in a layer (LAYERS in tests/test_layers.py)")
            continue
        reasons = ((line, why_not(unit, imported)) for line, imported in imports(path))
        offences += [f"{place}:{line}: {reason}" for line, reason in reasons if reason]
    return offences


def banned_imports(root: Path, files: Iterable[Path], *banned: str, mend: str) -> list[str]:
    return [
        f"{path.relative_to(root)}:{line}: imports {imported}: {mend}"
        for path in files
        for line, imported in imports(path)
        if any(is_within(imported, package) for package in banned)
    ]


def flags_outside_main(root: Path) -> list[str]:
    files = python_files(root, "ig_jax", "configs", "benchmarks")
    flags = ("absl.flags", "ml_collections.config_flags")
    return banned_imports(root, files, *flags, mend="only main.py knows flags")


def config_dicts_below_the_config_layer(root: Path) -> list[str]:
    below = [
        path
        for path in python_files(root, "ig_jax")
        if LAYER_OF.get(unit_of(module_name(path, root)), 0) < LAYER_OF["config"]
    ]
    return banned_imports(root, below, "ml_collections", mend="hand in a frozen dataclass")


def tensorflow_or_torch(root: Path) -> list[str]:
    # These two parts of clu import TensorFlow.
    frameworks = ("tensorflow", "torch", "clu.metric_writers", "clu.periodic_actions")
    files = python_files(root, "ig_jax", "configs", "benchmarks", "tests", "main.py")
    # The one file that is about PyTorch, and says so where it is not installed.
    others = [path for path in files if path != root / "benchmarks/torch_peer.py"]
    return banned_imports(root, others, *frameworks, mend="the project runs without it")


def files_called_utils(root: Path) -> list[str]:
    files = python_files(root, "ig_jax", "configs", "benchmarks", "tests")
    names = [path.relative_to(root).as_posix() for path in files]
    return [f"{name}: name it after what it holds" for name in names if "utils" in name]


def folders_that_are_no_package(root: Path) -> list[str]:
    folders = {path.parent for path in python_files(root, "ig_jax")}
    bare = sorted(folder for folder in folders if not (folder / "__init__.py").exists())
    return [f"{folder.relative_to(root)}: add __init__.py" for folder in bare]


def modules_main_never_reaches(root: Path) -> list[str]:
    """Dead code: modules that main.py imports neither directly nor through others."""
    modules = {module_name(path, root): path for path in python_files(root, "ig_jax")}
    reached, waiting = set(), [root / "main.py"]
    while waiting:
        for _, imported in imports(waiting.pop()):
            words = imported.split(".")
            # `from a.b import c` runs a and a.b too, and c may be a module or a name in one.
            names = {".".join(words[:end]) for end in range(1, len(words) + 1)}
            new = names & modules.keys() - reached
            reached |= new
            waiting += [modules[name] for name in new]
    # Called from Python so far: main.py has no mode yet that reads published weights.
    unreached = sorted(m for m in modules.keys() - reached if not is_within(m, "ig_jax.interop"))
    return [f"{modules[m].relative_to(root)}: import it somewhere or remove it" for m in unreached]


RULES = [
    imports_that_climb,
    flags_outside_main,
    config_dicts_below_the_config_layer,
    tensorflow_or_torch,
    files_called_utils,
    folders_that_are_no_package,
    modules_main_never_reaches,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_project_has_no(rule):
    assert rule(ROOT) == []


# The smallest tree with a lawful import of every kind.
LAWFUL = {
    "main.py": "from absl import app, flags\nfrom ig_jax import run\n",
    "ig_jax/__init__.py": "",
    "ig_jax/types.py": "import jax\nfrom collections.abc import Mapping\n",
    "ig_jax/models/__init__.py": "from ig_jax.models import sit\n",
    "ig_jax/models/sit.py": "from ig_jax.types import Latents, Times\nfrom clu import platform\n",
    "ig_jax/guidance.py": "import ig_jax.models.sit as net\nfrom ig_jax import types as words\n",
    "ig_jax/config.py": "import ml_collections\n",
    "ig_jax/build.py": "from ig_jax import config, guidance\n",
    "ig_jax/train.py": "def main():\n    from ig_jax import build\n",
    "ig_jax/run.py": "from ig_jax import train\n",
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source, encoding="utf-8")


@pytest.mark.parametrize("rule", RULES)
def test_a_lawful_tree_has_no(rule, tmp_path):
    plant(tmp_path, LAWFUL)
    assert rule(tmp_path) == []


MODEL = "ig_jax/models/sit.py"
IMPORT_OFFENDERS = [
    (MODEL, "import ig_jax.guidance", "layer 1 imports ig_jax.guidance of layer 2"),
    (MODEL, "import jax, ig_jax.guidance as g", "layer 1 imports ig_jax.guidance of layer 2"),
    (MODEL, "from ig_jax import types, train", "layer 1 imports ig_jax.train of layer 5"),
    (MODEL, "from ig_jax.data import digits", "layer 1 imports ig_jax.data.digits of layer 1"),
    (MODEL, "from . import layers", "relative import .layers: write `from ig_jax"),
    (MODEL, "from ..types import Latents", "relative import ..types.Latents: write"),
    ("ig_jax/ema.py", "from ig_jax.optim import x", "layer 1 imports ig_jax.optim.x of layer 1"),
    ("ig_jax/guidance.py", "from ig_jax import samplers", "layer 2 imports ig_jax.samplers of"),
    ("ig_jax/guidance.py", "def f():\n    from ig_jax import config", ":2: layer 2 imports"),
    ("ig_jax/guidance.py", "if TYPE_CHECKING:\n    import ig_jax.build", ":2: layer 2 imports"),
    ("ig_jax/config.py", "from ig_jax import build", "layer 4 imports ig_jax.build of layer 4"),
    ("ig_jax/tree.py", "from ig_jax import types", "layer 0 imports ig_jax.types of layer 0"),
    ("ig_jax/__init__.py", "import ig_jax.types", "layer 0 imports ig_jax.types of layer 0"),
    ("ig_jax/build.py", "import ig_jax", "imports ig_jax as a whole"),
    ("ig_jax/build.py", "from ig_jax import *", "imports ig_jax.*, which is in no layer"),
    ("ig_jax/build.py", "from ig_jax.extra import x", "imports ig_jax.extra.x, which is in no"),
    ("ig_jax/extra.py", "", "put it in a layer"),
    ("ig_jax/extra/deep/x.py", "", "put it in a layer"),
]
OTHER_OFFENDERS = [
    (flags_outside_main, "ig_jax/run.py", "from absl import app, flags", "imports absl.flags"),
    (flags_outside_main, "configs/a.py", "import absl.flags as f", "imports absl.flags"),
    (flags_outside_main, "ig_jax/run.py", "from ml_collections import config_flags", "only main"),
    (config_dicts_below_the_config_layer, MODEL, "import ml_collections", "frozen dataclass"),
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
    (modules_main_never_reaches, "ig_jax/models/dit.py", "import ig_jax.run", "or remove it"),
]


@pytest.mark.parametrize(
    ("rule", "name", "source", "expected"),
    [(imports_that_climb, *offender) for offender in IMPORT_OFFENDERS] + OTHER_OFFENDERS,
)
def test_a_planted_offender_is_the_one_line_listed(tmp_path, rule, name, source, expected):
    plant(tmp_path, LAWFUL | {name: source})
    (offence,) = rule(tmp_path)
    assert expected in offence


def test_a_name_that_only_begins_like_a_banned_one_is_allowed(tmp_path):
    plant(tmp_path, LAWFUL | {MODEL: "import torchless\nimport tensorflow_free.torch\n"})
    assert tensorflow_or_torch(tmp_path) == []
