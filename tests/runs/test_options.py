"""Options that verbs share: their signatures, their defaults, and what is said of values that they cannot have."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import spectra
from spectra.errors import UsageError
from spectra.runs.options import AuditOptions, options_of, takes_options
from tests.support.paths import FIXTURES

LORA, BASE = FIXTURES / "lora-r4", FIXTURES / "base"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": "0.5"}, "epsilon = '0.5'; expected a cosine above 0"),
        ({"epsilon": True}, "epsilon = True"),
        ({"top_k": 2.5}, "top-k = 2.5; expected a whole number"),
        ({"top_k": True}, "top-k = True"),
        ({"workers": "2"}, "workers = '2'; expected a whole number"),
        ({"threads": 1.5}, "threads = 1.5; expected a whole number, at least 1, or None"),
        ({"hash_contents": "yes"}, "hash_contents = 'yes'; expected True or False"),
        ({"allow_pickle": 1}, "allow_pickle = 1; expected True or False"),
        ({"dtype": float}, "dtype = <class 'float'>; expected a string"),
        ({"include": 3}, "include = 3; expected a pattern over module names, or several"),
        ({"exclude": [3]}, r"exclude = \[3\]; expected a pattern"),
        ({"progress": "yes"}, "progress = 'yes'; expected a function, or True for a bar"),
    ],
    ids=str,
)
def test_a_wrong_type_is_said(options, message):
    with pytest.raises(UsageError, match=message):
        spectra.audit(LORA, BASE, **options)


def test_a_string_is_one_pattern():
    one, listed = (spectra.audit(LORA, BASE, include=given) for given in ("*.v_proj", ["*.v_proj"]))
    assert [layer.name for layer in one] == [layer.name for layer in listed]
    assert len(one) == 4
    rest = spectra.audit(LORA, BASE, exclude="*.v_proj")
    assert len(rest) == 24
    assert len(spectra.inspect(LORA, BASE, include="*.v_proj").updates) >= 4


def test_numpy_numbers_are_numbers():
    numbers: Any = {"top_k": np.int64(3), "epsilon": np.float32(0.5)}
    assert spectra.audit(LORA, BASE, include="*.v_proj", **numbers).to_json()


def wrong(given: Any) -> Any:
    """What a type checker would refuse."""
    return given


def test_one_path_for_several_is_one():
    (report,) = spectra.audit_many(str(LORA), BASE, include="*.v_proj")
    assert report.tuned["path"] == str(LORA)
    with pytest.raises(UsageError, match="audit takes one fine-tune; for several there is audit_many"):
        spectra.audit(wrong([LORA]), BASE)
    with pytest.raises(UsageError, match="int is no model"):
        spectra.audit_many(wrong(3), BASE)


def test_true_shows_a_bar(capsys):
    spectra.audit(LORA, BASE, include="*.v_proj", progress=True)
    assert "left" in capsys.readouterr().err
    spectra.audit(LORA, BASE, include="*.v_proj", progress=False)
    assert capsys.readouterr().err == ""


def test_every_option_has_a_default_and_a_sentence():
    for name, (_, option) in options_of(AuditOptions).items():
        assert option.help.endswith("."), name
        assert not option.help[0].isspace()


def test_a_verb_gets_every_option():
    @takes_options(AuditOptions, engine="cached")
    def verb(tuned, *, own=1, **options):
        """Does something.

        Parameters
        ----------
        tuned : what.
        {options}
        """
        return tuned, own, options

    tuned, own, options = verb("a", epsilon=0.4)
    assert (tuned, own, options["epsilon"], options["engine"], options["top_k"]) == ("a", 1, 0.4, "cached", 10)
    assert options.keys() == options_of(AuditOptions).keys()
    assert inspect.signature(verb).parameters["engine"].default == "cached"
    assert "epsilon : an intruder's |cos|" in str(verb.__doc__)
    assert verb.__name__ == "verb"
    for arguments, named in (((), {}), (("a", "b"), {}), (("a",), {"epsilom": 1})):
        with pytest.raises(TypeError, match=r"^verb\(\): "):
            verb(*arguments, **named)
