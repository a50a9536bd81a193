"""The contract's text form, and the size expressions in it."""

import json
from dataclasses import replace

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from compiled_attn.ir.errors import ContractError
from compiled_attn.runtime import contract, describe
from compiled_attn.runtime import expr as ex
from compiled_attn.runtime.contract import (
    Call,
    ConstantSpec,
    Contract,
    MemberSpec,
    Needs,
    PassRecord,
    Range,
    TensorSpec,
)

CALL = Call(
    arguments=("x", "flag"),
    positional=1,
    inputs=(
        TensorSpec("x", "float32", ("batch", ("mul", 2, "rows"), 3), (0, 2, 1), "cpu", True),
        ConstantSpec("flag", 0.5),
    ),
    outputs=(TensorSpec("y", "bfloat16", (("add", ("mul", 2, "batch"), 1), "u0"), (0, 1), "cpu"),),
    symbols={"batch": Range(1, 16), "rows": Range(2, None), "u0": Range(0, None, bound=False)},
    guards=(("eq", ("mod", "batch", 2), 0),),
    in_tree="[1, {}]",
    out_tree="[1, {}]",
)
WHOLE = Contract(
    call=CALL,
    target=Needs("zen5", "cpu", "linux", "x86_64", ("avx2", "fma")),
    versions={"torch": "2.13.0"},
    passes=(PassRecord("reorganize-tokens", {"keep_rate": 0.7, "at": [3, 6, 9]}),),
    members=(MemberSpec("model/a", 3, "0" * 64),),
)
TEXT = WHOLE.to_bytes()

symbols = st.sampled_from(["a", "b", "rows_1"])


def _truth(e):
    return ("ne", e, 0)


sizes = st.recursive(
    st.one_of(st.integers(-9, 9), symbols),
    lambda e: st.one_of(
        st.tuples(st.sampled_from(["add", "mul", "max", "min"]), e, e, e),
        st.tuples(st.sampled_from(["floordiv", "mod", "eq", "ne", "lt", "le", "gt", "ge"]), e, e),
        st.tuples(st.sampled_from(["and", "or"]), e.map(_truth), e.map(_truth)),
        st.tuples(st.just("not"), e),
    ),
    max_leaves=12,
)


def changed(edit):
    value = json.loads(TEXT)
    edit(value)
    return contract.canonical(value)


def read(data):
    return contract.from_bytes(data, "file")


def test_a_contract_is_read_back_as_it_was_written():
    again = read(TEXT)
    assert again.to_bytes() == TEXT
    assert again.call == replace(CALL) and again.target == WHOLE.target and again.members == WHOLE.members


def test_a_contract_for_people_names_every_input_output_size_and_pass():
    shown = describe.text(WHOLE)
    for word in ("float32[batch, 2*rows, 3], memory order (0, 2, 1), state", "always 0.5", "1 to 16", "2 or more"):
        assert word in shown
    assert "u0                   0 or more, by the data" in shown and "keep_rate=0.7, at=[3, 6, 9]" in shown
    assert "bfloat16[(2*batch) + 1, u0]" in shown and "(batch%2) == 0" in shown


NOT_CANONICAL = {
    "empty": b"",
    "open": b"{",
    "list": b"[]",
    "word": b"nul",
    "cut": TEXT[:-1],
    "space behind": TEXT + b" ",
    "space before": b" " + TEXT,
    "space within": TEXT.replace(b":", b": ", 1),
    "twice": TEXT + TEXT,
    "deep": b"[" * 99999,
    "not a number": TEXT.replace(b"0.7", b"NaN"),
    "not ASCII": TEXT.replace(b"zen5", "zén5".encode()),
}


@pytest.mark.parametrize("data", NOT_CANONICAL.values(), ids=NOT_CANONICAL)
def test_a_text_that_is_not_canonical_json_is_refused(data):
    with pytest.raises(ContractError, match="not well formed"):
        read(data)


def test_a_key_that_comes_twice_is_refused():
    doubled = TEXT.replace(b'"contract_version":2', b'"contract_version":2,"contract_version":2')
    with pytest.raises(ContractError, match="canonical"):
        read(doubled)


def test_an_unknown_version_is_refused_before_its_fields_are_read():
    with pytest.raises(ContractError, match="version that this library does not know"):
        read(contract.canonical({"contract_version": 3, "other": 1}))


def _put(path, value):
    def edit(whole):
        place = whole
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return edit


BAD_FIELDS = {
    ("call", "inputs", 0, "dtype"): ["float", 3, None],
    ("call", "inputs", 0, "shape"): [
        ["batch", "rows"],
        [-1, 2, 3],
        [True, 2, 3],
        [["pow", 2, 3], 2, 3],
        "batch",
        [1] * 99,
    ],
    ("call", "inputs", 0, "order"): [[0, 1], [0, 1, 1], [0, 1, 3], [0, 1, -2]],
    ("call", "inputs", 0, "mutated"): [0, "no"],
    ("call", "inputs", 0, "kind"): ["tensors", None, "size"],
    ("call", "inputs", 1, "value"): [[], {}],
    ("call", "inputs", 1, "name"): ["x", 3],
    ("call", "symbols", "batch"): [{"min": 3, "max": 2, "bound": True}, {"min": -1, "max": 2, "bound": True}, 3],
    ("call", "symbols", "two words"): [{"min": 1, "max": 2, "bound": True}],
    ("call", "symbols", "unused"): [{"min": 1, "max": 2, "bound": True}],
    ("call", "guards"): [["batch"], [["add", "batch", 1]], [["eq", "u0", 1]], [["eq", "batch"]], [[]]],
    ("call", "outputs", 0, "shape"): [["nowhere", 1]],
    ("call", "arguments"): [["x", "x"], "x", [1]],
    ("call", "positional"): [3, -1, 1.5, True],
    ("call", "in_tree"): [None],
    ("members", 0, "sha256"): ["0" * 63, "G" * 64, None],
    ("members", 0, "size"): [-1, 2**63, "3"],
    ("passes", 0, "options"): [[], None],
    ("versions", "torch"): [2, None],
    ("target", "isa"): ["avx2", [1]],
    ("target", "origin"): ["cross-compiled", "", None, 3],
    ("target", "extra"): [1],
}


@pytest.mark.parametrize(("path", "value"), [(p, v) for p, values in BAD_FIELDS.items() for v in values], ids=str)
def test_a_field_of_the_wrong_form_is_named(path, value):
    with pytest.raises(ContractError, match="not well formed") as caught:
        read(changed(_put(path, value)))
    assert str(path[0]) in caught.value.facts and caught.value.where == "file" and caught.value.do


@given(st.integers(0, len(TEXT) - 1), st.integers(1, 255))
def test_a_changed_byte_gives_another_contract_or_an_error_never_a_crash(at, xor):
    damaged = TEXT[:at] + bytes([TEXT[at] ^ xor]) + TEXT[at + 1 :]
    try:
        assert read(damaged).to_bytes() == damaged
    except ContractError as error:
        assert error.what and error.facts and error.do


def test_the_stamp_covers_all_but_the_members():
    assert replace(WHOLE, members=()).stamp() == WHOLE.stamp()
    for field in (
        {"call": replace(CALL, positional=0)},
        {"target": replace(WHOLE.target, name="zen4")},
        {"versions": {"torch": "2.12.0"}},
        {"passes": ()},
    ):
        assert replace(WHOLE, **field).stamp() != WHOLE.stamp()


@given(sizes, st.integers(-5, 20), st.integers(-5, 20), st.integers(-5, 20))
def test_an_expression_means_what_its_text_says(size, a, b, rows_1):
    known = {"a": a, "b": b, "rows_1": rows_1}
    try:
        value = ex.evaluate(size, known)
    except ex.Undefined:
        return
    assert int(eval(ex.text(size), {"max": max, "min": min}, known)) == value


@given(sizes)
def test_an_expression_survives_json(size):
    assert ex.well_formed(json.loads(json.dumps(size))) == size


@given(st.integers(1, 9), st.integers(-4, 9), st.integers(0, 10**6))
def test_a_linear_expression_gives_back_its_symbol(slope, offset, size):
    linear = ("add", ("mul", slope, "a"), offset)
    assert ex.solve(linear, slope * size + offset, {}) == ("a", size)
    if slope > 1:
        assert ex.solve(linear, slope * size + offset + 1, {}) is None


@pytest.mark.parametrize(
    "size",
    [("mul", "a", "a"), ("floordiv", "a", 2), ("mod", "a", 3), ("add", "a", "b"), ("max", "a", 4), 3],
    ids=ex.text,
)
def test_what_is_not_linear_in_one_symbol_is_not_solved(size):
    assert ex.solve(size, 4, {}) is None


@pytest.mark.parametrize("size", [("floordiv", "a", 0), ("mod", "a", 0), "c", ("mul", 2**62, 2, "a")], ids=ex.text)
def test_an_expression_without_a_value_says_so(size):
    with pytest.raises(ex.Undefined):
        ex.evaluate(size, {"a": 5})


def test_torchs_symbolic_sizes_have_their_counterpart():
    s, t = sympy.symbols("s t", integer=True)
    assert ex.text(ex.from_sympy(2 * s + 1)) == "(2*s) + 1"
    assert ex.text(ex.from_sympy(s * t * 3)) == "3*s*t"
    assert ex.text(ex.from_sympy(s**2)) == "s*s"
    assert ex.from_sympy(sympy.Eq(s, 4)) == ("eq", "s", 4)
    with pytest.raises(ValueError, match="no counterpart"):
        ex.from_sympy(sympy.sin(s))
