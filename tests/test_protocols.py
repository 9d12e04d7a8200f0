"""Protocols: which utterances train, validate and test, what is refused, and what is said of shared speakers."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from python_training.data.corpus import Utterance
from python_training.protocols import (
    PROTOCOLS,
    check_leakage,
    cross_corpus,
    leakage_label,
    map_labels,
    relabelled,
    splits,
)

RANDOM, SESSION, SPEAKER = PROTOCOLS


def iemocap_like(size: int = 200) -> list[Utterance]:
    """10 speakers in 5 sessions of two, shuffled: nothing may depend on the order of the sequence."""
    utterances = []
    for i in range(size):
        session = f"Ses{i % 5 + 1:02d}"
        speaker = session + "FM"[i // 5 % 2]
        utterances.append(Utterance(f"{speaker}_{i:04d}", Path(f"{i}.wav"), speaker, i % 4, session))
    random.Random(1).shuffle(utterances)
    return utterances


UTTERANCES = iemocap_like()


def speakers(utterances: list[Utterance], chosen: tuple[int, ...]) -> set[str]:
    return {utterances[i].speaker for i in chosen}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_split_takes_every_utterance_once(protocol: str) -> None:
    found = splits(UTTERANCES, protocol, [0, 3])
    assert [s.seed for s in found] == sorted(s.seed for s in found)
    assert len({(s.name, s.seed) for s in found}) == len(found) == {RANDOM: 2, SESSION: 10, SPEAKER: 20}[protocol]
    for split in found:
        assert split.protocol == protocol and split.training and split.validation and split.test
        assert sorted(split.training + split.validation + split.test) == list(range(len(UTTERANCES)))
        check_leakage(split, UTTERANCES, allow=False)
    if protocol != RANDOM:
        tested = [i for s in found if s.seed == 0 for i in s.test]
        assert sorted(tested) == list(range(len(UTTERANCES)))


def test_random_split_is_the_one_of_the_published_rule() -> None:
    utterances = iemocap_like(5531)
    (split,) = splits(utterances, RANDOM, [0])
    random.seed(6990)
    published = random.sample(range(0, 5531), 1106)
    assert published[:5] == [944, 2450, 1796, 1607, 2794] and sum(published) == 3007551
    by_key = sorted(utterances, key=lambda u: u.key)
    assert {utterances[i].key for i in split.test} == {by_key[i].key for i in published}
    assert (len(split.test), len(split.validation), len(split.training)) == (1106, 442, 3983)
    assert (split.name, split.shares_speakers) == ("random", True)


def test_random_splits_depend_on_the_seed_and_not_on_the_order() -> None:
    first, second = splits(UTTERANCES, RANDOM, [0, 1])
    assert first.test != second.test and first.validation != second.validation
    turned = UTTERANCES[::-1]
    (again,) = splits(turned, RANDOM, [0])
    for part in ("training", "validation", "test"):
        keys = {UTTERANCES[i].key for i in getattr(first, part)}
        assert {turned[i].key for i in getattr(again, part)} == keys


def test_random_split_of_people_who_speak_once_shares_nobody() -> None:
    once = [dataclasses.replace(u, speaker=u.key) for u in UTTERANCES]
    (split,) = splits(once, RANDOM, [0])
    assert not split.shares_speakers and leakage_label(split, once) == ""


def test_leave_one_session_out() -> None:
    found = splits(UTTERANCES, SESSION, [7])
    assert [s.name for s in found] == [f"session-Ses0{i}" for i in range(1, 6)]
    last = found[-1]
    assert speakers(UTTERANCES, last.test) == {"Ses05F", "Ses05M"}
    assert speakers(UTTERANCES, last.validation) == {"Ses01F"}, "the first speaker of the next session, cyclic"
    assert speakers(UTTERANCES, last.training) == {"Ses01M"} | {f"Ses0{i}{sex}" for i in (2, 3, 4) for sex in "FM"}
    assert (last.test_of, last.validation_of, last.shares_speakers, last.seed) == (
        "session Ses05",
        "speaker Ses01F",
        False,
        7,
    )


def test_leave_one_speaker_out() -> None:
    """One fold per seed and speaker; the validation speaker is the next one in sorted order (cyclic)."""
    ring = sorted({u.speaker for u in UTTERANCES})
    wanted = [(seed, test, held) for seed in (0, 1) for test, held in zip(ring, [*ring[1:], ring[0]])]
    for split, (seed, test, held) in zip(splits(UTTERANCES, SPEAKER, [0, 1]), wanted, strict=True):
        assert (split.name, split.seed) == (f"speaker{test}", seed)
        assert speakers(UTTERANCES, split.test) == {test}
        assert speakers(UTTERANCES, split.validation) == {held}
        assert speakers(UTTERANCES, split.training) == set(ring) - {test, held}


@pytest.mark.parametrize(
    ("protocol", "change", "message"),
    [
        ("10-fold", {}, "protocol: expected one of random-80-20, leave-one-session-out, leave-one-speaker-out, "
                        "got '10-fold'"),
        (SESSION, {"session": ""}, "leave-one-session-out: expected the session of every utterance, got 200 of 200 "
                                   "utterances without a session"),
        (SESSION, {"session": "Ses01"}, "leave-one-session-out: expected at least 2 sessions, got 1"),
        (SPEAKER, {"speaker": ""}, "leave-one-speaker-out: expected the speaker of every utterance, got 200 of 200 "
                                   "without one"),
        (SESSION, {"speaker": ""}, "leave-one-session-out: expected the speaker of every utterance, got 200 of 200 "
                                   "without one"),
        (SPEAKER, {"speaker": "x"}, "leave-one-speaker-out: expected at least 3 speakers, got 1"),
    ],
)  # fmt: skip
def test_what_a_protocol_needs(protocol: str, change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        splits([dataclasses.replace(u, **change) for u in UTTERANCES], protocol, [0])  # type: ignore[arg-type]
    assert str(error.value) == message


def test_one_unknown_speaker_is_counted() -> None:
    with pytest.raises(ValueError, match="got 1 of 200 without one"):
        splits([dataclasses.replace(UTTERANCES[0], speaker=""), *UTTERANCES[1:]], SPEAKER, [0])


def test_too_few_utterances() -> None:
    with pytest.raises(ValueError, match="random-80-20, random: expected utterances to train on, to validate and to "):
        splits(UTTERANCES[:8], RANDOM, [0])


def with_a_guest() -> list[Utterance]:
    """Ses01F also speaks in session 2."""
    return [
        dataclasses.replace(u, speaker="Ses01F") if u.session == "Ses02" and u.label == 0 else u for u in UTTERANCES
    ]


def test_a_speaker_of_two_sessions_is_refused() -> None:
    utterances = with_a_guest()
    found = {s.name: s for s in splits(utterances, SESSION, [0])}
    assert [s.shares_speakers for s in found.values()] == [True, True, False, False, False]
    # Tested in session 2, trained on in session 1.
    split = found["session-Ses02"]
    with pytest.raises(ValueError) as error:
        check_leakage(split, utterances, allow=False)
    assert str(error.value) == (
        "session-Ses02: expected test speakers that are not in training (leave-one-session-out), got Ses01F in both"
    )
    check_leakage(split, utterances, allow=True)
    assert leakage_label(split, utterances) == (
        "NOT speaker-independent: 1 of 3 test speakers are also in training (protocol leave-one-session-out)"
    )
    # Tested in session 1, validated on in session 2: never.
    for allow in (False, True):
        with pytest.raises(
            ValueError, match="session-Ses01: expected test speakers that are not in validation .*Ses01F"
        ):
            check_leakage(found["session-Ses01"], utterances, allow=allow)
    check_leakage(found["session-Ses03"], utterances, allow=False)


def test_an_utterance_in_two_parts_is_refused() -> None:
    for protocol in PROTOCOLS:
        split = splits(UTTERANCES, protocol, [0])[0]
        wrong = dataclasses.replace(split, training=(*split.training, split.test[0]))
        with pytest.raises(ValueError, match=f"got {UTTERANCES[split.test[0]].key} in two"):
            check_leakage(wrong, UTTERANCES, allow=True)


def test_the_sentence_of_a_random_split() -> None:
    (split,) = splits(UTTERANCES, RANDOM, [0])
    assert leakage_label(split, UTTERANCES) == (
        "NOT speaker-independent: 10 of 10 test speakers are also in training (protocol random-80-20)"
    )
    nobody = [dataclasses.replace(u, speaker="") for u in UTTERANCES]
    (split,) = splits(nobody, RANDOM, [0])
    assert split.shares_speakers
    assert leakage_label(split, nobody).startswith("NOT known to be speaker-independent: speakers are unknown")
    assert {leakage_label(s, UTTERANCES) for s in splits(UTTERANCES, SPEAKER, [0])} == {""}


def test_cross_corpus() -> None:
    other = UTTERANCES[:30]
    split = cross_corpus(UTTERANCES, other, 4, ("iemocap", "emodb"))
    assert (split.protocol, split.name, split.seed) == ("cross-corpus", "cross-iemocap-to-emodb", 4)
    assert (split.test_of, split.validation_of) == ("all of emodb", "speaker Ses05M of iemocap")
    assert split.test == tuple(range(30)) and speakers(UTTERANCES, split.validation) == {"Ses05M"}
    assert sorted(split.training + split.validation) == list(range(200))
    assert "Ses05M" not in speakers(UTTERANCES, split.training)
    assert not split.shares_speakers and leakage_label(split, UTTERANCES) == ""
    check_leakage(split, UTTERANCES, allow=False)
    known = dataclasses.replace(split, shares_speakers=True, leakage="NOT apart")
    assert leakage_label(known, UTTERANCES) == "NOT apart"
    with pytest.raises(ValueError, match="at least 2 speakers to train on, got 1"):
        cross_corpus([u for u in UTTERANCES if u.speaker == "Ses01F"], other, 0)
    with pytest.raises(ValueError, match="speaker of every utterance to train on, got 1 of 201"):
        cross_corpus([*UTTERANCES, dataclasses.replace(other[0], speaker="")], other[1:], 0)
    with pytest.raises(ValueError, match="cross-corpus: expected utterances of target, got none"):
        cross_corpus(UTTERANCES, [], 0)


def test_labels_of_another_corpus() -> None:
    labels, lines = map_labels(["ang", "hap", "neu", "sad"], ["fear", "joy", "hap", "ang"], {"joy": "hap"})
    assert labels == {1: 1, 2: 1, 3: 0}
    assert lines == [
        "label joy of the target counts as hap",
        "label hap of the target counts as hap",
        "label ang of the target counts as ang",
        "labels of the target without a counterpart, left out: fear",
        "labels of the source that are never tested: neu, sad",
    ]
    kept = relabelled([dataclasses.replace(UTTERANCES[0], label=label) for label in range(4)], labels)
    assert [u.label for u in kept] == [1, 1, 0]
    for source, target, mapping, message in (
        (["a"], ["b"], {"c": "a"}, "labels: expected one of b to map, got 'c'"),
        (["a"], ["b"], {"b": "d"}, "labels: expected b to count as one of a, got 'd'"),
        (["a"], ["b"], {}, "labels: expected a target label that counts as one of a, got b"),
    ):
        with pytest.raises(ValueError) as error:
            map_labels(source, target, mapping)
        assert str(error.value) == message
