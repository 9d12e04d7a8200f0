"""Seeded batches: the same stream for any number of workers and processes and after a resume; augmentation."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from avser_fast.config import ClipRule, FrontEnd
from avser_fast.errors import ConfigError
from avser_fast.inference.features import features as front_end_features
from python_training.data import PreparedCorpus, prepare, read_corpus
from python_training.data.augment import (
    Augmentation,
    WaveformChange,
    add_noise,
    augment_face,
    augment_features,
    shift,
)
from python_training.data.batches import Batch, Plan, Samples, batches
from python_training.data.boxes import Boxes, with_boxes
from python_training.data.faces import to_unit
from python_training.data.synthetic import write_iemocap

FRONT = FrontEnd(normalization="global", mean=(5.0,), std=(4.0,))
RULE = ClipRule(clips=3, clip_frames=64, rule="even")
EVERYTHING = Augmentation(
    time_warp=0.1,
    band_warp=0.1,
    band_mask=5,
    time_mask=10,
    level=0.1,
    noise=0.1,
    mixup=0.3,
    speeds=(0.9,),
    noise_snr=(15.0, 30.0),
    vtlp=(0.8, 1.2),
    time_shift=0.1,
    face_flip=0.5,
    face_crop=0.1,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> PreparedCorpus:
    """Speech and faces of an artificial corpus, 20 utterances."""
    folder = tmp_path_factory.mktemp("batches")
    tree = write_iemocap(folder / "tree", sessions=2, dialogs=2, turns=8)
    prepare(with_boxes(read_corpus("iemocap", tree.root), Boxes(tree.boxes), detect=False), folder / "out")
    ready = PreparedCorpus(folder / "out")
    assert len(ready) == 20
    return ready


def samples_of(corpus: PreparedCorpus, augmentation: Augmentation | None = None, **options: object) -> Samples:
    return Samples(corpus, FRONT, RULE, seed=7, augmentation=augmentation, faces=corpus, **options)  # type: ignore[arg-type]


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b) if x is not None and y is not None)


def joined(parts: list[Batch]) -> Batch:
    return Batch._make(None if values[0] is None else torch.cat(values) for values in zip(*parts))  # type: ignore[arg-type]


# The stream


@pytest.fixture(scope="module")
def stream(corpus: PreparedCorpus) -> list[Batch]:
    """Seven steps over more than two epochs, everything random switched on."""
    plan = Plan(corpus.with_speech, 6, seed=7, faces=corpus.with_face)
    assert plan.steps_per_epoch == 3
    return list(batches(plan, samples_of(corpus, EVERYTHING), last=7))


def test_shapes(stream: list[Batch]) -> None:
    for batch in stream:
        assert batch.clips.shape == (6, 3, 1, 64, 40) and batch.clips.dtype == torch.float32
        assert batch.valid.shape == (6, 3) and batch.valid.dtype == torch.bool
        assert batch.labels.shape == (6,) and batch.targets.shape == (6, 4)
        torch.testing.assert_close(batch.targets.sum(1), torch.ones(6))
        assert batch.faces is not None and batch.faces.shape == (6, 5, 1, 224, 40)
        assert float(batch.faces.min()) >= -1 and float(batch.faces.max()) <= 1 and float(batch.faces.std()) > 0.1
        assert batch.face_labels is not None and batch.face_targets is not None
    assert not any(equal(a, b) for i, a in enumerate(stream) for b in stream[:i])


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_same_stream_with_any_number_of_workers(corpus: PreparedCorpus, stream: list[Batch], workers: int) -> None:
    plan = Plan(corpus.with_speech, 6, seed=7, faces=corpus.with_face)
    again = list(batches(plan, samples_of(corpus, EVERYTHING), last=7, workers=workers))
    assert len(again) == len(stream) and all(equal(a, b) for a, b in zip(again, stream))


@pytest.mark.parametrize("world", [2, 3])
def test_the_same_stream_cut_among_processes(corpus: PreparedCorpus, stream: list[Batch], world: int) -> None:
    parts = []
    for rank in range(world):
        plan = Plan(corpus.with_speech, 6, seed=7, faces=corpus.with_face)
        parts.append(list(batches(plan, samples_of(corpus, EVERYTHING), last=7, rank=rank, world=world)))
    assert all(len(b.labels) == 6 // world for part in parts for b in part)
    assert all(equal(joined(list(of_ranks)), whole) for of_ranks, whole in zip(zip(*parts), stream))


@pytest.mark.parametrize("first", [1, 4, 6])
def test_the_same_stream_after_a_resume_in_the_middle_of_an_epoch(
    corpus: PreparedCorpus, stream: list[Batch], first: int
) -> None:
    plan = Plan(corpus.with_speech, 6, seed=7, faces=corpus.with_face)
    rest = list(batches(plan, samples_of(corpus, EVERYTHING), first=first, last=7, workers=first % 2))
    assert len(rest) == 7 - first and all(equal(a, b) for a, b in zip(rest, stream[first:]))


def test_another_seed_is_another_stream(corpus: PreparedCorpus, stream: list[Batch]) -> None:
    plan = Plan(corpus.with_speech, 6, seed=8, faces=corpus.with_face)
    other = Samples(corpus, FRONT, RULE, seed=8, augmentation=EVERYTHING, faces=corpus)
    assert not equal(next(batches(plan, other, last=1)), stream[0])


def test_an_epoch_goes_through_everybody_once(corpus: PreparedCorpus) -> None:
    plan = Plan(range(20), 5, seed=1, faces=range(8))
    epochs = [[d for s in range(4) for d in plan.batch(4 * e + s)] for e in range(6)]
    for epoch, draws in enumerate(epochs):
        assert sorted(d.speech for d in draws) == list(range(20))
        assert [d.position for d in draws] == list(range(20)) and {d.epoch for d in draws} == {epoch}
    assert len({tuple(d.speech for d in draws) for draws in epochs}) == 6
    faces = Counter(d.face for draws in epochs for d in draws)
    assert set(faces) == set(range(8)) and set(faces.values()) == {15}, "120 rows, each of 8 faces equally often"
    for draws in (plan.batch(3), plan.batch(17)):
        assert Counter(d.partner for d in draws) == Counter(d.speech for d in draws)
        assert Counter(d.face_partner for d in draws) == Counter(d.face for d in draws)
    assert plan.batch(2) == Plan(range(20), 5, seed=1, faces=range(8)).batch(2), "in any order"


def test_a_rest_is_left_out_and_a_small_set_is_one_batch() -> None:
    plan = Plan(range(11), 4, seed=0)
    assert plan.steps_per_epoch == 2
    assert set().union(*({d.speech for d in plan.batch(s)} for s in range(12))) == set(range(11))
    assert sorted(d.speech for d in Plan([3, 5], 8, seed=0).batch(0)) == [3, 5]
    assert all(d.face is None for d in plan.batch(0))


def test_paired_faces_are_the_speakers_own(corpus: PreparedCorpus) -> None:
    plan = Plan(corpus.with_speech, 5, seed=0, faces=corpus.with_face, paired=True)
    assert all(d.face == d.speech and d.face_partner == d.partner for s in range(8) for d in plan.batch(s))
    batch = next(batches(plan, samples_of(corpus), last=1))
    assert batch.face_labels is not None and torch.equal(batch.labels, batch.face_labels)
    with pytest.raises(ValueError, match="paired: expected a face for every utterance, got none for 18 of 20"):
        Plan(range(20), 5, seed=0, faces=[3, 4], paired=True)


def test_speech_and_faces_of_two_corpora(corpus: PreparedCorpus, prepared_emodb: PreparedCorpus) -> None:
    plan = Plan(prepared_emodb.with_speech, 4, seed=0, faces=corpus.with_face)
    samples = Samples(prepared_emodb, FRONT, RULE, seed=0, faces=corpus, face_frames=2)
    batch = next(batches(plan, samples, last=1))
    draws = plan.batch(0)
    assert batch.labels.tolist() == [prepared_emodb.utterances[d.speech].label for d in draws]
    assert batch.faces is not None and batch.faces.shape == (4, 2, 1, 224, 40) and batch.face_labels is not None
    for row, draw in enumerate(draws):
        assert draw.face is not None and batch.face_labels[row] == corpus.utterances[draw.face].label
        np.testing.assert_array_equal(batch.faces[row, :, 0], to_unit(corpus.face(draw.face)[[1, 3]]))


def test_without_augmentation_a_row_is_what_inference_sees(corpus: PreparedCorpus) -> None:
    from avser_fast.inference.features import engine_module

    plan = Plan(corpus.with_speech, 4, seed=0, faces=corpus.with_face)
    batch = next(batches(plan, samples_of(corpus), last=1))
    for row, draw in enumerate(plan.batch(0)):
        values = front_end_features(corpus.waveform(draw.speech).astype(np.float32), FRONT)
        clips, valid = engine_module().frame_clips(values, RULE.clips, RULE.clip_frames, RULE.rule)
        np.testing.assert_array_equal(batch.valid[row], valid)
        heard = clips[valid]
        np.testing.assert_array_equal(batch.clips[row][batch.valid[row]], heard)
        # Clips of padding repeat the others, so that no silence enters the statistics of batch norm.
        for place, clip in enumerate(batch.clips[row].numpy()):
            assert valid[place] or (clip == heard[place % len(heard)]).all()
        assert batch.faces is not None and draw.face is not None
        np.testing.assert_array_equal(batch.faces[row, :, 0], to_unit(corpus.face(draw.face)))
        one_hot = np.eye(4)[corpus.utterances[draw.speech].label]
        np.testing.assert_array_equal(batch.targets[row], one_hot)


def test_crops(corpus: PreparedCorpus) -> None:
    plan = Plan(corpus.with_speech, 20, seed=0)
    wide = Samples(corpus, FRONT, dataclasses.replace(RULE, clip_frames=1000), seed=0, crops=True)
    narrow = Samples(corpus, FRONT, RULE, seed=0, crops=True)
    for samples, frames in ((wide, 1000), (narrow, 64)):
        batch = next(batches(plan, samples, last=1))
        assert batch.clips.shape == (20, 1, 1, frames, 40) and batch.faces is None and bool(batch.valid.all())
        for row, draw in enumerate(plan.batch(0)):
            whole = front_end_features(corpus.waveform(draw.speech).astype(np.float32), FRONT)[0]
            crop = batch.clips[row, 0, 0].numpy()
            inside = crop[np.abs(crop).sum(1) > 0]
            starts = np.flatnonzero((whole == inside[0]).all(1))
            assert any(np.array_equal(whole[s : s + len(inside)], inside) for s in starts)
            assert len(inside) == min(frames, len(whole))


def test_what_cannot_be_is_named(corpus: PreparedCorpus, tmp_path: Path, emodb: Path) -> None:
    with pytest.raises(ValueError, match="plan: expected at least one utterance with speech, got none"):
        Plan([], 4, seed=0)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        Plan([1], 0, seed=0)
    with pytest.raises(ValueError, match="plan: expected at least one utterance with speech, got none"):
        Plan(np.arange(0), 4, seed=0)  # type: ignore[arg-type]
    assert Plan(np.arange(9), 4, seed=0).batch(5) == Plan(range(9), 4, seed=0).batch(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a batch size that 4 processes can share, got 6"):
        batches(Plan(range(20), 6, seed=0), samples_of(corpus), last=1, world=4)
    with pytest.raises(ValueError, match="clip_rule: expected a fixed number of clips"):
        Samples(corpus, FRONT, ClipRule(rule="even", clips=None), seed=0)
    with pytest.raises(ValueError, match="face_frames: expected 1 to 5, got 6"):
        samples_of(corpus, face_frames=6)
    from python_training.data import Classes

    prepare(read_corpus("emodb", emodb, Classes(("sad", "ang"))), tmp_path / "two")
    whole = read_corpus("emodb", emodb)
    prepare(dataclasses.replace(whole, utterances=whole.utterances[:20]), tmp_path / "other")
    other = Samples(PreparedCorpus(tmp_path / "other"), FRONT, RULE, seed=0, faces=corpus)
    paired = Plan(range(20), 5, seed=0, faces=range(20), paired=True)
    with pytest.raises(ValueError, match=f"expected faces of {tmp_path / 'other'} for a paired plan, got those of "):
        batches(paired, other, last=1)
    with pytest.raises(ValueError, match="expected faces of the classes sad, ang, got ang, hap, neu, sad"):
        Samples(PreparedCorpus(tmp_path / "two"), FRONT, RULE, seed=0, faces=corpus)


def test_what_a_worker_is_sent_holds_no_arrays(corpus: PreparedCorpus, stream: list[Batch]) -> None:
    """Workers that are spawned get everything pickled."""
    samples = samples_of(corpus, EVERYTHING)
    plan = Plan(corpus.with_speech, 6, seed=7, faces=corpus.with_face)
    next(batches(plan, samples, last=1))  # the files are mapped
    sent = pickle.dumps(samples)
    assert len(sent) < 20_000
    assert equal(next(batches(plan, pickle.loads(sent), first=4, last=5)), stream[4])


# Augmentation


def test_noise_has_the_ratio_that_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    clean = (1000 * np.sin(np.arange(48000) / 7)).astype(np.float32)
    for snr in (0.0, 15.0, 30.0):
        noise = add_noise(clean, snr, rng) - clean
        assert 10 * np.log10(np.mean(clean**2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.2)
    assert (add_noise(np.zeros(10, np.float32), 20.0, rng) == 0).all()


def test_shift() -> None:
    x = np.arange(1, 6, dtype=np.float32)
    assert shift(x, 2).tolist() == [0, 0, 1, 2, 3] and shift(x, -2).tolist() == [3, 4, 5, 0, 0]
    assert shift(x, 0).tolist() == x.tolist() and not shift(x, 9).any() and not shift(x, -9).any()


def test_waveform_changes_are_drawn_from_their_ranges() -> None:
    settings = Augmentation(noise_snr=(15.0, 30.0), vtlp=(0.8, 1.2), time_shift=0.1, waveform_share=0.5)
    drawn = [WaveformChange.draw(settings, 16000, np.random.default_rng(i)) for i in range(400)]
    noisy = [d.snr_db for d in drawn if d.snr_db is not None]
    warped = [d.vtlp for d in drawn if d.vtlp != 1.0]
    assert 150 < len(noisy) < 250 and 150 < len(warped) < 250
    assert 15 <= min(noisy) < 16 and 29 < max(noisy) <= 30 and 0.8 <= min(warped) < 0.82 and 1.18 < max(warped) <= 1.2
    shifts = [d.shift for d in drawn]
    assert min(shifts) < -1500 and max(shifts) > 1500 and max(map(abs, shifts)) <= 1600
    assert WaveformChange.draw(Augmentation(), 16000, np.random.default_rng(0)).nothing


def ramp(frames: int = 50, bands: int = 20) -> np.ndarray:
    values = np.arange(frames, dtype=np.float32)[:, None] + 100 * np.arange(bands, dtype=np.float32)
    return values[None, None] + 1


def test_features_are_warped_about_the_middle_and_the_lowest_band() -> None:
    warped = augment_features(ramp(), Augmentation(time_warp=0.2), np.random.default_rng(1))[0, 0]
    steps = np.diff(warped[:, 0])[10:-10]
    assert steps.std() < 1e-4 and 0.8 <= steps[0] <= 1.2 and steps[0] != 1
    assert warped[24:26, 0].mean() == pytest.approx(25.5, abs=1e-3)
    bands = augment_features(ramp(), Augmentation(band_warp=0.2), np.random.default_rng(1))[0, 0]
    assert (bands[:, 0] == ramp()[0, 0, :, 0]).all() and bands[0, 5] != ramp()[0, 0, 0, 5]
    still = augment_features(ramp(), Augmentation(), np.random.default_rng(1))
    np.testing.assert_array_equal(still, ramp())


def test_masks_level_and_noise() -> None:
    original = ramp()
    masked = augment_features(original, Augmentation(band_mask=4, time_mask=9), np.random.default_rng(3))[0, 0]
    assert (original == ramp()).all(), "what is cached is not written to"
    rows, columns = (masked == 0).all(1).sum(), (masked == 0).all(0).sum()
    assert 0 < rows <= 18 and 0 < columns <= 8
    assert (masked == 0).sum() == rows * 20 + columns * 50 - rows * columns
    level = augment_features(original, Augmentation(level=1.0), np.random.default_rng(3)) - original
    assert np.ptp(level) < 1e-3 and abs(level.mean()) > 1e-3
    noise = augment_features(original, Augmentation(noise=0.5), np.random.default_rng(3)) - original
    assert 0.4 < noise.std() < 0.6


def test_faces_are_mirrored_and_cropped() -> None:
    frames = np.linspace(-1, 1, 224 * 40, dtype=np.float32).reshape(1, 224, 40).repeat(2, 0)
    mirrored = augment_face(frames, Augmentation(face_flip=1.0), np.random.default_rng(0))
    np.testing.assert_array_equal(mirrored, frames[..., ::-1])
    np.testing.assert_array_equal(augment_face(frames, Augmentation(), np.random.default_rng(0)), frames)
    for seed in range(20):
        cropped = augment_face(frames, Augmentation(face_crop=0.2), np.random.default_rng(seed))
        assert cropped.shape == frames.shape
        rows = cropped[0, :, 0]
        assert frames[0, 0, 0] - 1e-6 <= rows[0] and rows[-1] <= frames[0, -1, -1] + 1e-6
        kept = np.ptp(rows) / np.ptp(frames[0, :, 0])
        assert 0.79 < kept < 1.0 and np.diff(rows).std() < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_snr": (30.0, 15.0)}, "noise_snr: expected nothing or a lowest and a highest value"),
        ({"vtlp": (0.1, 1.2)}, "vtlp: expected factors from 0.5 to 2"),
        ({"speeds": (0.9, 0.0)}, r"speeds: expected factors from 0.5 to 2, got \(0.9, 0.0\)"),
        ({"level": float("nan")}, "level: expected 0 or more, got nan"),
        ({"time_warp": 1.5}, "time_warp: expected less than 1, got 1.5"),
        ({"mixup": 0.6}, "mixup: expected 0 to 0.5, got 0.6"),
        ({"face_flip": -0.1}, "face_flip: expected 0 to 1.0, got -0.1"),
        ({"time_shift": -1.0}, "time_shift: expected 0 or more, got -1.0"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augmentation(**settings)  # type: ignore[arg-type]
