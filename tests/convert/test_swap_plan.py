"""Which layer gets which mechanism, and what wrong requests say."""

import pytest

from subquad import InputError
from subquad.convert.swap import plan

pytestmark = pytest.mark.usefixtures("toys")


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ([0, -1, 3, 3], [0, 3, 5]),
        (range(2), [0, 1]),
        (2, [2]),
        ("3:1", [0, 1, 2, 4, 5]),
        ("1:2", [0, 3]),
        ("2:1", [0, 1, 3, 4]),
    ],
)
def test_layers(layers, expected):
    assert plan(6, "toy-linear", layers, bias=2.0) == {index: ("toy-linear", {"bias": 2.0}) for index in expected}


def test_a_mapping_names_a_mechanism_for_each_layer():
    layers = {-1: "toy-linear", "1": {"name": "toy-softmax", "causal": True}, 0: {"bias": 3.0}}
    found = plan(6, "toy-linear", layers)
    assert found == {0: ("toy-linear", {"bias": 3.0}), 1: ("toy-softmax", {"causal": True}), 5: ("toy-linear", {})}
    assert list(found) == [0, 1, 5]


@pytest.mark.parametrize(
    ("to", "layers", "options", "message"),
    [
        ("toy-liner", "all", {}, "nearest: toy-linear"),
        ("toy-linear", "all", {"bais": 1.0}, "bais: got 'bais'; expected an option of toy-linear; nearest: bias"),
        ("toy-linear", "all", {"bias": object()}, "JSON"),
        ("toy-linear", [6], {}, "layers: got layer 6; expected an index from -6 to 5"),
        ("toy-linear", [-7], {}, "layer -7"),
        ("toy-linear", [True], {}, "layer True"),
        ("toy-linear", [], {}, "no layer"),
        ("toy-linear", "some", {}, "layers: got 'some'"),
        ("toy-linear", "0:1", {}, "layers: got '0:1'"),
        ("toy-linear", 1.5, {}, "layers: got 1.5"),
        ("toy-linear", {0: "toy-linear", -6: "toy-linear"}, {}, "layer 0 twice"),
        ("toy-linear", {}, {}, "an empty mapping"),
        (None, {0: {"bias": 1.0}}, {}, "layer 0"),
        (None, "all", {}, "to: got None"),
    ],
)
def test_wrong_requests(to, layers, options, message):
    with pytest.raises(InputError) as error:
        plan(6, to, layers, **options)
    assert message in str(error.value) and "\n" not in str(error.value)
