"""SRA's settings for a published network, whose file holds its head but not what it compared."""

from __future__ import annotations

from typing import Any

# (family, depth) -> the blocks that the published networks compare: student's, teacher's.
BLOCKS = {
    ("sit", 12): (3, 8),
    ("sit", 24): (6, 16),
    ("sit", 28): (8, 20),
    ("dit", 28): (8, 16),
}


def term_settings(family: str, depth: int) -> dict[str, Any]:
    """The section of the term `self_alignment`, as the published code has it for this family.

    A depth that was not published gets blocks at a quarter and three quarters, as its authors
    advise.
    """
    usual = max(1, round(depth / 4)), max(1, round(3 * depth / 4))
    student, teacher = BLOCKS.get((family, depth), usual)
    loss = (
        {"weight": 0.04, "distance": "smooth_l1", "beta": 0.05}
        if family == "dit"
        else {"weight": 0.5, "distance": "cosine_tokens"}
    )
    return {**loss, "depth": student, "teacher_depth": teacher, "max_interval": 0.2}


def note(term: dict[str, Any]) -> str:
    """A remark on what was assumed, given the section of the term."""
    return (
        f"SRA's head trains on in the term self_alignment, block {term['depth']} against block "
        f"{term['teacher_depth']} of the average: the file does not say which; the config can"
    )
