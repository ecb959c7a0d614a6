"""What the README shows."""

import re
import sys

from places import ROOT

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def example(name: str) -> type:
    """The class `name` that a python block of the README defines."""
    [block] = [b for b in blocks("python") if f"class {name}" in b]
    # A module of its own: dataclasses look up annotations through the module's name.
    module = type(sys)(f"readme_{name.lower()}")
    sys.modules[module.__name__] = module
    exec(compile(block, "README.md", "exec"), module.__dict__)
    return getattr(module, name)
