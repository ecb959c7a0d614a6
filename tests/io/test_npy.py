"""Headers of .npy files: what numpy and others write is read, and what they do not is refused."""

import io
import warnings

import numpy as np
import pytest

from ig_jax.io import array_bounds, npy


def saved(array, version=None):
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy tells that version 2 is for later ones
        np.lib.format.write_array(content, np.asarray(array), version)
    return content.getvalue()


def with_header(text, values=b"", version=1):
    """A file with this text for a header."""
    width = 2 if version == 1 else 4
    length = len(text).to_bytes(width, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode("latin1") + values


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
TWO = np.array([1, 2], "<f4").tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize(
    "array",
    [
        *(np.arange(6, dtype=code).reshape(2, 3) for code in ("<f4", ">f8", "<i2", "|u1", "<c16")),
        *(np.array(3.5), np.array(["a", "bcd"]), np.array([b"ab"]), np.array([True, False])),
        *(np.zeros((0, 3)), np.zeros(0), np.asfortranarray(np.arange(6.0).reshape(2, 3))),
        np.zeros(2, "V2"),  # how numpy saves bfloat16
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_what_numpy_writes_is_read(array, version):
    found = npy.array(saved(array, version))
    np.testing.assert_array_equal(found, array, strict=True)
    assert found.flags.f_contiguous == np.asarray(array).flags.f_contiguous


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN.replace("'", '"'),
        "{'shape': (2,), 'fortran_order': False, 'descr': '<f4'}\n",
        "{'descr':'<f4','fortran_order':False,'shape':(2,)}" + " " * 900 + "\n",
        "  {'descr': '<f4', 'fortran_order': False, 'shape': (2L,), }  ",
        "{ 'descr' : '<f4' , 'fortran_order' : True , 'shape' : ( 2 , ) , }",
    ],
)
def test_what_other_writers_write_is_read(text):
    np.testing.assert_array_equal(npy.array(with_header(text, TWO)), [1, 2])


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "{",
            "{}",
            "[]",
            "None",
            PLAIN[1:],
            PLAIN[:-1],
            PLAIN + "}",
            PLAIN + "1",
            "{" + PLAIN,
        ),
        PLAIN.replace("(2,)", "(2"),  # a token that does not end: numpy's reader raises TokenError
        PLAIN.replace("(2,)", "('''"),
        PLAIN.replace("(2,)", "(" * 300 + ")" * 300),
        PLAIN.replace("(2,)", "-" * 5000 + "2"),
        PLAIN.replace("(2,)", "[2]"),
        PLAIN.replace("(2,)", "(-2,)"),
        PLAIN.replace("(2,)", "(2.0,)"),
        PLAIN.replace("(2,)", "(2,,)"),
        PLAIN.replace("(2,)", "(2 2)"),
        PLAIN.replace("(2,)", "(,)"),
        PLAIN.replace("(2,)", f"({'9' * 5000},)"),
        PLAIN.replace("(2,)", "(True,)"),
        PLAIN.replace("False", "0"),
        PLAIN.replace("'<f4'", "'<f3'"),
        PLAIN.replace("'<f4'", "'|O'"),
        PLAIN.replace("'<f4'", "'f4,f4'"),
        PLAIN.replace("'<f4'", "'(2,3)f4'"),
        PLAIN.replace("'<f4'", "[('a', '<f4')]"),
        PLAIN.replace("'<f4'", "'<U999999999999'"),
        PLAIN.replace("'<f4'", r"'\q'"),
        PLAIN.replace("'descr'", "'shape'"),
        PLAIN.replace("'descr'", "'a'"),
        PLAIN.replace("}", "'descr': '<f4'}"),
        PLAIN.replace("}", "'more': 1}"),
        PLAIN + " " * npy.LONGEST,
    ],
)
def test_a_header_of_anything_else_is_refused(text):
    with pytest.raises(ValueError):
        npy.header(with_header(text, TWO))


@pytest.mark.parametrize("kept", range(8 + 2 + len(PLAIN)))
def test_a_header_cut_short_is_refused(kept):
    with pytest.raises(ValueError):
        npy.header(with_header(PLAIN)[:kept])


def test_a_version_that_is_to_come_is_refused():
    with pytest.raises(ValueError, match="does not begin as an .npy file does"):
        npy.header(with_header(PLAIN, TWO, version=4))


def test_a_length_of_gigabytes_is_refused_before_it_is_read():
    with pytest.raises(ValueError, match="4,294,967,295 bytes is more than the 10,000 allowed"):
        npy.header(b"\x93NUMPY\x02\x00" + b"\xff" * 4)


def test_with_any_bit_of_its_header_flipped_a_file_is_read_or_refused():
    whole = saved(np.arange(6, dtype=np.float32))
    for bit in range(8 * (len(whole) - 24)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << (bit % 8)
        try:
            npy.array(bytes(changed))
        except ValueError:
            pass


# What a file declares


@pytest.mark.parametrize(
    ("shape", "itemsize", "held"),
    [
        ((), 8, 8),
        ((2, 3), 4, 24),
        ([2, 3], 4, 24),
        ((0,), 4, 0),
        ((0, 3, 2), 4, 0),
        ((1,) * 32, 1, 1),
    ],
)
def test_a_shape_of_as_many_bytes_as_there_are_is_right(shape, itemsize, held):
    array_bounds.require_fit(shape, itemsize, held)


@pytest.mark.parametrize(
    ("shape", "itemsize", "held", "says"),
    [
        ((2, 3), 4, 23, "needs 24 bytes, but 23 are there"),
        ((2, 3), 4, 25, "needs 24 bytes, but 25 are there"),
        ((10**15,), 8, 128, "needs 8000000000000000 bytes, but 128 are there"),
        ((2**32, 2**32), 1, 0, "needs 18446744073709551616 bytes"),  # 0, had it 64 bits
        ((0, 3), 4, 12, "needs 0 bytes, but 12 are there"),
        ((10**15, 0, 8, 3), 1, 0, "has rows without elements"),
        ((5,), 0, 0, "has rows without elements"),
        ((0, 2**40, 2**40), 4, 0, "needs 0 bytes"),
        ((1,) * 33, 1, 1, "33 axes is more than the 32 allowed"),
        ((-1,), 4, 4, "is no shape"),
        ((2.0,), 4, 8, "is no shape"),
        ((True,), 4, 4, "is no shape"),
        (("2",), 4, 8, "is no shape"),
        (2, 4, 8, "is no shape"),
        (None, 4, 8, "is no shape"),
        ((10**5000,), 4, 8, "a tuple with a number of thousands of digits needs a number of"),
    ],
)
def test_a_shape_of_other_bytes_than_there_are_is_refused(shape, itemsize, held, says):
    with pytest.raises(ValueError, match=says) as caught:
        array_bounds.require_fit(shape, itemsize, held)
    assert len(str(caught.value)) < 600
