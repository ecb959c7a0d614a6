"""A short form of helpers/fuzz_configs.py, and the long one; and that it finds what it is for."""

import fuzz_configs
import pytest

from ig_jax.config import parser

# ml_collections reads a config file in a way that Python 3.12 no longer has.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.mark.slow
def test_mutated_configs_are_described_or_refused_in_a_sentence():
    assert not [str(f) for f in fuzz_configs.fuzz(200, 0, fuzz_configs.SMALL, described=2)]


@pytest.mark.slow
def test_ten_thousand_mutated_configs_are_described_or_refused_in_a_sentence():
    assert not [str(f) for f in fuzz_configs.fuzz(10_000, 0, fuzz_configs.ALL)]


def test_an_exception_of_another_kind_is_found(monkeypatch):
    """As before a name was asked whether it is a text."""
    monkeypatch.setattr(parser, "pick", lambda table, name, path: table[name])
    found = fuzz_configs.fuzz(200, 0, ("digits",), described=0)
    assert any("KeyError" in f.what or "TypeError" in f.what for f in found)
