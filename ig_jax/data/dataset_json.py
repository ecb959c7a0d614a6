"""Classes of files as the published tools write them: `dataset.json` at the root of their tree.

It holds {"labels": [[file, class], ...]}, in any order, with names relative to the root; or
{"labels": null}, where the files have no classes.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32

from ig_jax.data import file_tree
from ig_jax.data.file_tree import FileTree
from ig_jax.errors import LONGEST_SHOWN, UserError, shown
from ig_jax.io import files

DATASET_JSON = "dataset.json"


def read(tree: FileTree, names: list[str], num_classes: int) -> Int32[np.ndarray, "n"] | None:
    """The class of every name; None where the file gives no labels.

    Raises:
      UserError: the file is cut off or damaged, names a file twice, a label is none of
        0..num_classes - 1, or its files are not exactly `names`; names the file.
    """
    file, entries, label_of = tree.place(DATASET_JSON), _entries(tree), {}
    if entries is None:
        return None
    for entry in entries:
        match entry:
            case [str(name), int(label)] if type(label) is int:  # JSON has true, too
                pass
            case _:
                raise UserError(
                    f"{file}: entry {shown(entry)} must be [file, class number]; fix it"
                )
        if not 0 <= label < num_classes:
            raise UserError(
                f"{file}: label {shown(label)} of {name[:LONGEST_SHOWN]} must lie in "
                f"0..{num_classes - 1}; raise num_classes or fix the label"
            )
        if name in label_of:
            raise UserError(
                f"{file}: names {name[:LONGEST_SHOWN]} twice, of class {label_of[name]} and "
                f"{label}; keep one of them"
            )
        label_of[name] = label
    unlabelled = [name for name in names if name not in label_of]
    if unlabelled:
        raise UserError(
            f"{file}: {file_tree.some(unlabelled)} not in it; add their labels or remove them"
        )
    if len(label_of) > len(names):
        absent = sorted(label_of.keys() - set(names))
        raise UserError(
            f"{file}: {file_tree.some(absent)} in it but not beside it; copy them again"
        )
    return np.asarray([label_of[name] for name in names], np.int32)


def without_classes(count: int, num_classes: int, reason: str) -> Int32[np.ndarray, "n"]:
    """Labels of so many files that have none: class 0, which is the only one.

    Args:
      reason: why they have none, from the place on, for the message.

    Raises:
      UserError: there are to be more classes.
    """
    if num_classes != 1:
        raise UserError(
            f"{reason}, but num_classes = {num_classes}; set num_classes = 1 to train without "
            "classes"
        )
    return np.zeros(count, np.int32)


def _entries(tree: FileTree) -> list | None:
    file = tree.place(DATASET_JSON)
    match files.parse_json(tree.read(DATASET_JSON), file):
        case {"labels": list() | None as entries}:
            return entries
        case dict() as content if "labels" not in content:
            return None
        case content:
            raise UserError(
                f'{file}: must hold {{"labels": [[file, class], ...]}}, or {{"labels": null}} '
                f"without classes, but holds {shown(content)}; fix it"
            )
