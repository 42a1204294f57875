"""Tests of labels."""

import pytest

from data.labels import CLASS_NAMES as KNOWN_BY_OLD_PROGRAMS
from data.labels import parse_reply
from data.oxford_flowers import CLASS_NAMES, IMAGES_PER_CLASS


def test_the_official_classes():
    assert CLASS_NAMES is KNOWN_BY_OLD_PROGRAMS
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 102 and sum(IMAGES_PER_CLASS) == 8189
    assert (CLASS_NAMES[0], CLASS_NAMES[59], CLASS_NAMES[101]) == (
        "pink primrose",
        "pink-yellow dahlia?",
        "blackberry lily",
    )


@pytest.mark.parametrize(
    ("reply", "name"),
    [
        ("rose", "rose"), (" Rose.\n", "rose"), ("COLT'S  foot", "colt's foot"),
        ("pink-yellow dahlia", "pink-yellow dahlia?"),
        ("a rose", None), ("", None), ("roses", None),
    ],
)  # fmt: skip
def test_a_reply_is_a_class_only_if_it_is_its_whole_name(reply, name):
    index = parse_reply(reply, CLASS_NAMES)
    assert (None if index is None else CLASS_NAMES[index]) == name


def test_accents_are_the_same_however_they_are_written_and_nothing_is_no_class():
    assert parse_reply("E\u0301pine", ["?", "\u00e9pine"]) == 1 == parse_reply("\u00c9pine", ["?", "e\u0301pine"])
    assert parse_reply(" . ", ["?", "oak"]) is None


def test_every_name_is_its_own_class():
    assert [parse_reply(name, CLASS_NAMES) for name in CLASS_NAMES] == list(range(102))
