"""What the README and the pages beside it show."""

import re
import sys

from places import ROOT

README, RESULTS, EXTENDING = "README.md", "docs/results.md", "docs/extending.md"


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(language: str, *pages: str) -> list[str]:
    return [
        block
        for page in pages
        for block in re.findall(rf"```{language}\n(.*?)```", text(page), re.DOTALL)
    ]


def example(name: str) -> type:
    """The class `name` that a Python block of `EXTENDING` defines."""
    [block] = [b for b in blocks("python", EXTENDING) if f"class {name}" in b]
    # A module of its own: dataclasses look up annotations through the module's name.
    module = type(sys)(f"example_{name.lower()}")
    sys.modules[module.__name__] = module
    exec(compile(block, EXTENDING, "exec"), module.__dict__)
    return getattr(module, name)
