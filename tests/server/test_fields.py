"""What forms and JSON bodies say, without a server."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_context import SparseContextConfig
from sparse_context.server.errors import ApiError
from sparse_context.server.fields import from_text, nest
from sparse_context.server.schema import known_fields
from sparse_context.server.settings import Settings
from sparse_context.server.wanted import read_wanted

SETTINGS = Settings(name="tiny", config=SparseContextConfig(keep=0.3, coverage=0.2), keep_high=0.6, call={"steps": 5})


def wanted(is_form=False, edits=True, **values):
    return read_wanted({"prompt": "the cat", **values}, SETTINGS, edits, is_form)


@pytest.mark.parametrize(
    ("items", "values"),
    [
        ([("keep", "0.2")], {"keep": "0.2"}),
        ([("keep[]", "0.1"), ("keep[]", "0.5")], {"keep": ["0.1", "0.5"]}),
        ([("keep[]", "0.1")], {"keep": ["0.1"]}),
        ([("keep[1]", "0.5"), ("keep[0]", "0.1")], {"keep": ["0.1", "0.5"]}),
        ([("keep", "0.1"), ("keep", "0.5")], {"keep": ["0.1", "0.5"]}),
        ([("selector[edges]", "0.5"), ("selector[detail]", "1")], {"selector": {"edges": 0.5, "detail": 1}}),
    ],
)
def test_both_ways_to_flatten_a_form_are_read(items, values):
    assert nest(items) == values


@pytest.mark.parametrize(
    "names",
    [["a[b][c]"], ["a[]", "a"], ["a[b]", "a[]"], ["a[b]", "a[b]"], ["a[0]", "a[0]"], ["a[1]", "a[]"], ["[a]"], [""]]
    + [["a]"], ["a[" * 9]],
)
def test_names_that_contradict_each_other_are_refused(names):
    with pytest.raises(ApiError) as caught:
        nest([(name, "1") for name in names])
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.2", 0.2),
        ("40", 40),
        ("auto", "auto"),
        ("true", True),
        ("null", None),
        ("[0.1, 0.5]", [0.1, 0.5]),
        ('{"edges": 1}', {"edges": 1}),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("1" * 5000, "1" * 5000),
        ("[" * 10_000, "[" * 10_000),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_text_of_a_form_is_the_value_that_json_has_for_it(text, value):
    assert from_text(text) == value


def test_a_mapping_that_has_a_key_twice_is_refused():
    with pytest.raises(ApiError) as raised:
        from_text('{"edges": 0.2, "edges": 5}')
    assert raised.value.status == 400 and raised.value.message.endswith("has 'edges' twice: write it once.")


def test_what_a_client_leaves_out_is_as_the_server_has_it():
    read = wanted()
    assert read.request.config == SETTINGS.config and read.request.steps == 5
    assert (read.format, read.compression, read.stream, read.partials, len(read.seeds)) == ("png", 100, False, 0, 1)
    assert not read.is_seeded and 0 <= read.seeds[0] < 2**31
    assert wanted(keep=0.1).request.config == SparseContextConfig(keep=0.1, coverage=0.2)
    assert wanted(input_fidelity="high").request.config.keep == 0.6
    assert wanted(coverage=None).request.config.coverage is None


def test_nothing_in_json_means_nothing_and_in_the_config_what_it_means_there():
    read = wanted(n=None, seed=None, stream=None, size=None, overview=None)
    assert len(read.seeds) == 1 and read.request.config.overview is None
    assert wanted(is_form=True, overview="null").request.config.overview is None


def test_every_field_of_the_config_is_a_field_of_a_request():
    given = {"keep": 0.4, "selector": "edges", "task": "edit", "overview": 4, "overview_layout": "spread"}
    more = {"coverage": 0.1, "share": "joint", "floor": 2, "multiple_of": 8, "mass": 0.7, "psnr": 30.0}
    config = wanted(**given, **more, selection_seed=3, merge=0.0).request.config
    assert config == SparseContextConfig(**given, **more, seed=3, merge=0.0)
    names = {"selection_seed" if name == "seed" else name for name in vars(SparseContextConfig())}
    names -= {"text_model"}  # which model is loaded is not for clients to say
    assert names <= known_fields(SETTINGS, edits=True).keys()
    assert "text_model" not in known_fields(SETTINGS, edits=True)
    assert not (names - {"seed"}) & known_fields(SETTINGS, edits=False).keys()


def test_the_same_request_has_the_same_digest_and_prompt_and_seed_are_no_part_of_what_is_alike():
    first = wanted(seed=1)
    assert first.digest("a") == wanted(seed=1).digest("a") != first.digest("b")
    assert wanted().digest("a") == wanted().digest("a") != wanted(n=2).digest("a")
    for fields in ({"seed": 2}, {"prompt": "x"}, {"keep": 0.1}, {"size": "64x64"}, {"num_inference_steps": 2}):
        other = wanted(**{"seed": 1, **fields})
        assert other.digest("a") != first.digest("a")
        assert (other.alike("a") == first.alike("a")) == (set(fields) <= {"seed", "prompt"})


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(known_fields(SETTINGS, True))) | st.text(), PLAIN), st.booleans())
def test_whatever_is_sent_is_read_or_refused_in_a_sentence(values, is_form):
    values = {"prompt": "x", **{name: json.dumps(value) if is_form else value for name, value in values.items()}}
    try:
        read_wanted(values, SETTINGS, True, is_form)
    except ApiError as error:
        assert error.status in (400, 404)
        assert error.message.endswith((".", "?")) and "\n" not in error.message and len(error.message) < 1000
