"""Who trains, who picks the epoch and who is tested: the protocols of evaluation, and what each says of a speaker.

A split holds indices into the sequence of utterances that it was made of.  No utterance is ever in two of its parts.
Whether a speaker is, is said by the split itself (``shares_speakers``) and by ``leakage_label``, which every output of
such an evaluation carries.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .data.corpus import Utterance

RANDOM, SESSION, SPEAKER = "random-80-20", "leave-one-session-out", "leave-one-speaker-out"
PROTOCOLS = (RANDOM, SESSION, SPEAKER)
#: Train on one corpus, test on another: made by ``cross_corpus``.
CROSS_CORPUS = "cross-corpus"
#: A model that was trained before, on all of a corpus: made by ``saved_model.py``.
SAVED = "saved-model"

#: Seed of the published code; seed k of random-80-20 is this plus k.
PUBLISHED_SEED = 6990


@dataclass(frozen=True)
class Split:
    """One training and its test.  ``training``, ``validation`` and ``test`` are disjoint indices in ascending order.

    ``test_of`` and ``validation_of`` say in words whose utterances those are.  ``shares_speakers``: a speaker of the
    test is also in training or validation, or may be because speakers are unknown.  ``leakage`` is the sentence about
    it where the utterances of the split do not tell, as those of another corpus do not.
    """

    protocol: str
    name: str
    seed: int
    training: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]
    test_of: str
    validation_of: str
    shares_speakers: bool
    leakage: str = ""


def splits(utterances: Sequence[Utterance], protocol: str, seeds: Sequence[int]) -> list[Split]:
    """Every split of a protocol, seed by seed.

    random-80-20           as in the published code: ``random.sample`` with seed 6990 draws 20 % of the utterances (1106
                           of 5531) as the test, here of the list sorted by key (the order of the published list is not
                           known, so the rule is the published one and the utterances need not be).  Seed 0 is that
                           draw, seed k draws with 6990 + k.  The same generator then draws 10 % of the rest, in that
                           order, for validation; the published code has no validation.  Its speakers are in all parts.
    leave-one-session-out  the test is a session; validation is the first speaker of the next session (both sorted,
                           cyclic), who is left out of training; training is everybody else.
    leave-one-speaker-out  the test is a speaker, validation the next one (sorted, cyclic).

    ValueError for an unknown protocol, and for utterances that lack what the protocol goes by.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if protocol == RANDOM:
        return [_random(utterances, seed) for seed in seeds]
    speakers = _known_speakers(utterances, f"{protocol}: expected the speaker of every utterance")
    if protocol == SESSION:
        lacking = sum(not u.session for u in utterances)
        if lacking:
            raise ValueError(
                f"{protocol}: expected the session of every utterance, got {lacking} of {len(utterances)} utterances "
                "without a session"
            )
        sessions = sorted({u.session for u in utterances})
        if len(sessions) < 2:
            raise ValueError(f"{protocol}: expected at least 2 sessions, got {len(sessions)}")
    if len(speakers) < 3:
        raise ValueError(f"{protocol}: expected at least 3 speakers, got {len(speakers)}")
    if protocol == SPEAKER:
        ring = list(zip(speakers, [*speakers[1:], speakers[0]]))
        return [_leave_speaker(utterances, test, held, seed) for seed in seeds for test, held in ring]
    ring = list(zip(sessions, [*sessions[1:], sessions[0]]))
    return [_leave_session(utterances, test, held, seed) for seed in seeds for test, held in ring]


def cross_corpus(
    source: Sequence[Utterance], target: Sequence[Utterance], seed: int, names: tuple[str, str] = ("source", "target")
) -> Split:
    """Train on one corpus and test on all of another; ``names`` are theirs.

    ``training`` and ``validation`` (the last speaker of ``source`` in sorted order) are indices into ``source``,
    ``test`` into ``target``, whose labels must already be those of ``source`` (``map_labels``, ``relabelled``).
    Whether somebody is in both is not known here.  ValueError for a source with unknown speakers or fewer than 2.
    """
    learnt, name = names
    if not target:
        raise ValueError(f"{CROSS_CORPUS}: expected utterances of {name}, got none")
    speakers = _known_speakers(source, f"{CROSS_CORPUS}: expected the speaker of every utterance to train on")
    if len(speakers) < 2:
        raise ValueError(f"{CROSS_CORPUS}: expected at least 2 speakers to train on, got {len(speakers)}")
    held = speakers[-1]
    return Split(
        CROSS_CORPUS,
        f"cross-{learnt}-to-{name}",
        seed,
        tuple(i for i, u in enumerate(source) if u.speaker != held),
        tuple(i for i, u in enumerate(source) if u.speaker == held),
        tuple(range(len(target))),
        f"all of {name}",
        f"speaker {held} of {learnt}",
        False,
    )


def map_labels(
    source_labels: Sequence[str], target_labels: Sequence[str], mapping: Mapping[str, str] | None = None
) -> tuple[dict[int, int], list[str]]:
    """Which label of a target corpus counts as which of the source (both indices), and lines that say so.

    ``mapping`` names a source label for a target label (``joy`` as ``hap``); a target label that it does not name
    counts as the source label of the same name, and is left out, and named, where there is none.  ValueError where
    ``mapping`` names a label that does not exist, or no label is left.
    """
    mapping = mapping or {}
    for target, source in mapping.items():
        if target not in target_labels:
            raise ValueError(f"labels: expected one of {', '.join(target_labels)} to map, got {target!r}")
        if source not in source_labels:
            raise ValueError(f"labels: expected {target} to count as one of {', '.join(source_labels)}, got {source!r}")
    chosen = {target: mapping.get(target, target) for target in target_labels}
    found = {target: source for target, source in chosen.items() if source in source_labels}
    if not found:
        raise ValueError(
            f"labels: expected a target label that counts as one of {', '.join(source_labels)}, got "
            f"{', '.join(target_labels) or 'none'}"
        )
    lines = [f"label {target} of the target counts as {source}" for target, source in found.items()]
    left = [target for target in target_labels if target not in found]
    if left:
        lines.append(f"labels of the target without a counterpart, left out: {', '.join(left)}")
    absent = [source for source in source_labels if source not in found.values()]
    if absent:
        lines.append(f"labels of the source that are never tested: {', '.join(absent)}")
    target_index = {label: i for i, label in enumerate(target_labels)}
    source_index = {label: i for i, label in enumerate(source_labels)}
    return {target_index[target]: source_index[source] for target, source in found.items()}, lines


def relabelled(utterances: Iterable[Utterance], labels: Mapping[int, int]) -> list[Utterance]:
    """The utterances whose label ``map_labels`` found a counterpart for, with the label of the source."""
    return [dataclasses.replace(u, label=labels[u.label]) for u in utterances if u.label in labels]


def check_leakage(split: Split, utterances: Sequence[Utterance], allow: bool = False) -> None:
    """Raise ValueError, naming the shared speakers, where a split tests speakers that it should not know.

    An utterance in two parts is refused always.  random-80-20 shares speakers by its rule and says so.  Otherwise a
    validation speaker who is tested is refused always, a training speaker who is tested unless ``allow``.
    ``utterances`` are those that the split was made of, for cross-corpus the source's.
    """
    parts = [split.training, split.validation] + ([] if split.protocol == CROSS_CORPUS else [split.test])
    places = [i for part in parts for i in part]
    if len(set(places)) < len(places):
        twice = next(i for i in places if places.count(i) > 1)
        raise ValueError(
            f"{split.name}: expected utterances in one part of the split, got {utterances[twice].key} in two"
        )
    if split.protocol in (RANDOM, CROSS_CORPUS):
        return
    tested = _speakers(utterances, split.test)
    for part, what, allowed in ((split.validation, "validation", False), (split.training, "training", allow)):
        shared = sorted(tested & _speakers(utterances, part))
        if shared and not allowed:
            raise ValueError(
                f"{split.name}: expected test speakers that are not in {what} ({split.protocol}), got "
                f"{', '.join(speaker or 'unknown ones' for speaker in shared)} in both"
            )


def leakage_label(split: Split, utterances: Sequence[Utterance]) -> str:
    """The sentence that every output of this split carries; empty where no test speaker is in training or validation.

    ``utterances`` are those that the split was made of, for cross-corpus the source's.
    """
    if split.protocol in (CROSS_CORPUS, SAVED):
        return split.leakage
    tested = _speakers(utterances, split.test)
    for part, what in ((split.training, "training"), (split.validation, "validation")):
        heard = _speakers(utterances, part)
        if "" in tested | heard:
            return f"NOT known to be speaker-independent: speakers are unknown (protocol {split.protocol})"
        shared = tested & heard
        if shared:
            return (
                f"NOT speaker-independent: {len(shared)} of {len(tested)} test speakers are also in {what} "
                f"(protocol {split.protocol})"
            )
    return ""


def _known_speakers(utterances: Sequence[Utterance], expected: str) -> list[str]:
    """Every speaker, sorted; ValueError, which begins with ``expected``, where some utterance has none."""
    unknown = sum(not u.speaker for u in utterances)
    if unknown:
        raise ValueError(f"{expected}, got {unknown} of {len(utterances)} without one")
    return sorted({u.speaker for u in utterances})


def _speakers(utterances: Sequence[Utterance], chosen: Iterable[int]) -> set[str]:
    return {utterances[i].speaker for i in chosen}


def _split(
    utterances: Sequence[Utterance],
    protocol: str,
    name: str,
    seed: int,
    test: Iterable[int],
    validation: Iterable[int],
    test_of: str,
    validation_of: str,
) -> Split:
    """A split whose training is what is neither tested nor validated on."""
    tested, held = set(test), set(validation)
    rest = tuple(i for i in range(len(utterances)) if i not in tested and i not in held)
    if not rest or not held or not tested:
        raise ValueError(
            f"{protocol}, {name}: expected utterances to train on, to validate and to test, got {len(rest)}, "
            f"{len(held)} and {len(tested)}"
        )
    split = Split(protocol, name, seed, rest, tuple(sorted(held)), tuple(sorted(tested)), test_of, validation_of, False)
    return dataclasses.replace(split, shares_speakers=bool(leakage_label(split, utterances)))


def _random(utterances: Sequence[Utterance], seed: int) -> Split:
    order = sorted(range(len(utterances)), key=lambda i: utterances[i].key)
    generator = random.Random(PUBLISHED_SEED + seed)
    test = set(generator.sample(order, int(0.2 * len(order))))
    rest = [i for i in order if i not in test]
    validation = generator.sample(rest, int(0.1 * len(rest)))
    return _split(
        utterances, RANDOM, "random", seed, test, validation, "20 % of the utterances", "10 % of the other utterances"
    )


def _leave_speaker(utterances: Sequence[Utterance], test: str, held: str, seed: int) -> Split:
    return _split(
        utterances,
        SPEAKER,
        f"speaker{test}",
        seed,
        (i for i, u in enumerate(utterances) if u.speaker == test),
        (i for i, u in enumerate(utterances) if u.speaker == held),
        f"speaker {test}",
        f"speaker {held}",
    )


def _leave_session(utterances: Sequence[Utterance], test: str, following: str, seed: int) -> Split:
    held = min(u.speaker for u in utterances if u.session == following)
    return _split(
        utterances,
        SESSION,
        f"session-{test}",
        seed,
        (i for i, u in enumerate(utterances) if u.session == test),
        (i for i, u in enumerate(utterances) if u.speaker == held and u.session != test),
        f"session {test}",
        f"speaker {held}",
    )
