"""How the tests use a source of data, and what they ask of its refusals."""

import numpy as np
import pytest

from ig_jax.errors import UserError


def use(source):
    return source.batch(np.arange(len(source)))


def refuses(source, *words, error=UserError):
    """Using it fails with one sentence that has all these words."""
    with pytest.raises(UserError) as caught:
        use(source)
    assert caught.type is error
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message and not message.endswith(".")
