"""Work in parts: what is on the disk is not made again; the whole is that of an unbroken run."""

import json

import pytest

from ig_jax.errors import UserError
from ig_jax.io import files
from ig_jax.parallel.resumable import Parts


class Squares(Parts):
    """The squares of ten numbers, in files of four."""

    def __init__(self, folder, broken_at=None):
        super().__init__(folder / "parts", 10, 4)
        self.broken_at, self.made = broken_at, []

    def file(self, part):
        return self.parts_folder / f"{part}.json"

    def read(self, part):
        found = files.read_json(self.file(part))
        return found if len(found) == len(self.ranges[part]) else None

    def make(self, part, readers, bar):
        if part == self.broken_at:
            raise KeyboardInterrupt
        self.made.append(part)
        files.write_json(self.file(part), list(readers.map(lambda i: i * i, self.ranges[part])))
        bar.update(len(self.ranges[part]))

    def merge(self, found):
        files.write_json(self.parts_folder.parent / "whole.json", sum(found, []))


def test_only_the_parts_that_are_left_are_made(tmp_path):
    first, second = Squares(tmp_path, broken_at=2), Squares(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        first.complete("squaring")
    assert not (tmp_path / "whole.json").exists()
    second.complete("squaring")
    assert (first.made, second.made) == ([0, 1], [2])
    assert json.loads((tmp_path / "whole.json").read_text()) == [i * i for i in range(10)]
    assert [file.name for file in tmp_path.iterdir()] == ["whole.json"]


@pytest.mark.parametrize("content", ["", "[1]"])
def test_a_damaged_part_is_made_again(tmp_path, content):
    with pytest.raises(KeyboardInterrupt):
        Squares(tmp_path, broken_at=2).complete("squaring")
    (tmp_path / "parts" / "1.json").write_text(content)
    again = Squares(tmp_path)
    again.complete("squaring")
    assert again.made == [1, 2]


def test_a_part_that_is_damaged_while_others_are_made_is_named(tmp_path):
    class Meddled(Squares):
        def make(self, part, readers, bar):
            super().make(part, readers, bar)
            self.file(0).write_text("")

    with pytest.raises(UserError, match=r"0\.json: was damaged meanwhile; run the same command"):
        Meddled(tmp_path).complete("squaring")
    assert not (tmp_path / "whole.json").exists()
    again = Squares(tmp_path)
    again.complete("squaring")
    assert again.made == [0]
