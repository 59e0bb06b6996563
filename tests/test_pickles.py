"""Pickles of anybody: plain data and arrays come out as they went in, everything else is refused and nothing runs."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simsearch.data.pickles import read_pickle

RECORD = {"gnd": [{"bbx": np.array([1.5, 2.0]), "easy": np.array([0, 2])}], "names": ["a", "b"], "whole": (None, 1)}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", ["u1", "i2", ">i4", "u8", "f4", ">f8"])
def test_arrays_come_back_as_they_were(kind, protocol):
    for shape in ((), (0,), (5,), (2, 3), (0, 4), (2, 3, 4)):
        values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)
        for array in (values, np.asfortranarray(values), values.T, values[..., ::-1] if shape else values):
            (one, other), again = read_pickle(pickle.dumps([(array, array), array], protocol=protocol))
            for found in (one, other, again):
                assert isinstance(found, np.ndarray)
                assert found.dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
                assert np.array_equal(found, array)


def test_pickles_of_python_2_are_read():
    """Its str: byte strings, also as the raw data of arrays."""
    binary = b"\x80\x02}q\x00(U\x04easyq\x01]q\x02(K\x01M\xe8\x03eU\x03bbxq\x03G?\xf8\x00\x00\x00\x00\x00\x00u."
    assert read_pickle(binary) == {"easy": [1, 1000], "bbx": 1.5}
    assert read_pickle(b"(dp0\nS'easy'\np1\n(lp2\nI1\naI01\naL7L\nas.") == {"easy": [1, True, 7]}
    array = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x10" + struct.pack("<qq", 200, -1) + b"tb."
    )
    assert read_pickle(array).tolist() == [200, -1]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(min_size=1), inner),
    max_leaves=20,
)


@settings(max_examples=40, deadline=None)
@given(plain, st.integers(3, 5))
def test_plain_values_come_back_as_unpickling_gives_them(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol=protocol)) == value


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_end_in_plain_data_or_in_a_value_error(data):
    whole = bytearray(pickle.dumps(RECORD, protocol=data.draw(st.integers(0, 5))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(1, len(whole)))])
    try:
        value = read_pickle(cut)
    except ValueError:
        return
    assert not callable(value)


class Calls:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class WithNew:
    pass


class Persistent(pickle.Pickler):
    def persistent_id(self, value):
        return "a" if value == "secret" else None


def persistent(protocol: int) -> bytes:
    out = io.BytesIO()
    Persistent(out, protocol).dump(["secret"])
    return out.getvalue()


class TestHostilePickles:
    """`weapon` leaves a file when it is called: unpickled, it goes off; read here, it does not."""

    @pytest.mark.parametrize("protocol", range(6))
    def test_calls_are_refused_and_named(self, protocol, tmp_path):
        mark = tmp_path / "mark"
        for function, argument, name in (
            (os.system, f"touch {mark}", "system"),
            (eval, f"open({str(mark)!r}, 'w')", "eval"),
            (exec, f"open({str(mark)!r}, 'w')", "exec"),
            (os.mkdir, str(mark), "mkdir"),
        ):
            for hidden in (lambda x: x, lambda x: {"gnd": [x]}, lambda x: np.array([x, None], object)):
                data = pickle.dumps(hidden(Calls(function, argument)), protocol=protocol)
                with pytest.raises(ValueError, match=rf"\.{name}, which is refused|dtype 'O8'"):
                    read_pickle(data)
                assert not mark.exists()
                pickle.loads(data)
                assert mark.exists(), "the weapon of this test is blunt"
                mark.rmdir() if mark.is_dir() else mark.unlink()

    @pytest.mark.parametrize("protocol", range(6))
    @pytest.mark.parametrize(
        ("value", "named"),
        [
            (WithNew(), r"copyreg\._reconstructor|copy_reg\._reconstructor|NEWOBJ"),
            (Calls(np.load, "x.npy"), r"numpy.*\.load"),
            (Calls(bytes, 10**9), r"\.bytes"),
            (Calls(np.zeros, 10**9), "zeros"),
            ({1, 2}, r"\.set|EMPTY_SET"),
            (np.array(["a"]), "dtype 'U1'"),
            (1j, r"\.complex"),
        ],
    )
    def test_other_classes_are_refused(self, value, named, protocol):
        with pytest.raises(ValueError, match=named):
            read_pickle(pickle.dumps(value, protocol=protocol))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (persistent(0), "PERSID"),
            (persistent(4), "BINPERSID"),
            (b"\x80\x02\x82\x01.", "EXT1"),
            (b"cbuiltins\ngetattr\n(cnumpy\ndtype\nS'mro'\ntR.", "builtins.getattr, which is refused"),
            (b"ccopyreg\n__newobj__\n(cnumpy\ndtype\ntR.", "copyreg.__newobj__, which is refused"),
            (b"(ios\nsystem\n.", "INST"),
            (b"(cos\nsystem\nS'true'\no.", "OBJ"),
            (b"\x80\x05\x97.", "NEXT_BUFFER"),
            (b"]}b.", "sets the state of a list"),
            (b"}}b.", "sets the state of a dict"),
            (b"cnumpy\ndtype\n}b.", "sets the state of a _Global"),
            (b"(lI1\n(tR.", "calls a int"),
            (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.", "os.system, which is refused"),
            (b"\x80\x04\x8c\x05numpy\x8c\x0bdtype.mro.x\x93)R.", r"numpy.dtype.mro.x"),
            (b"cnumpy.core.multiarray\nscalar\n(cos\nsystem\nS'x'\ntR.", "numpy.core.multiarray.scalar"),
            (b"]r\xff\xff\xff\x7fg5\n.", "uses a value that it did not store"),
            (b"}]I1\ns.", "a dict whose key"),
            (b"}(S'a'\nu.", "an incomplete item"),
            (b"(I1\na.", "not a list"),
            (b"0.", "uses a value that it did not store"),
            (b"", "exhausted"),
            (b"]", "exhausted"),
            (b"{}", "opcode"),
        ],
    )
    def test_odd_programs_are_refused(self, data, message):
        with pytest.raises(ValueError, match=message):
            read_pickle(data)

    def test_a_loaded_global_stays_a_name(self):
        value = read_pickle(b"cos\nsystem\n.")
        assert not callable(value)
        assert (value.module, value.name) == ("os", "system")

    def test_a_small_file_does_not_unfold_to_a_large_value(self):
        text = b"X" + struct.pack("<I", 1000) + b"x" * 1000
        encode = b"c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R0"
        with pytest.raises(ValueError, match="more than its own length"):
            read_pickle(b"\x80\x02" + text + b"q\x00" + encode * 1000 + b".")

    @pytest.mark.parametrize(
        ("shape", "raw"),
        [
            (b"K\x02K\x02\x86", 3), (b"K\x02\x85", 3), (b"J\xff\xff\xff\xff\x85", 2), (b"]K\x02a", 2), (b"K\x02", 2),
            (b"\x88\x85", 1),
            (b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85", 2), (b"K\x01" * 65 + b"t", 1), (b"G" + b"\0" * 8 + b"\x85", 0),
        ],
    )  # fmt: skip
    def test_shapes_that_do_not_fit_the_bytes_are_refused(self, shape, raw):
        dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        whole = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        mark = b"(" if shape.endswith(b"t") else b""
        state = b"(K\x01" + mark + shape + dtype + b"\x89U" + bytes([raw]) + b"x" * raw + b"tb."
        with pytest.raises(ValueError, match=r"the pickle holds|the pickle is damaged|reshape|dimension"):
            read_pickle(b"\x80\x02" + whole + state)

    def test_a_high_position_in_the_memo_takes_no_memory(self):
        tracemalloc.start()
        assert read_pickle(b"]r\xff\xff\xff\x7f.") == []
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10**6
