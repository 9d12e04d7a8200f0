"""The store of arrays: shards, memory maps, interruption, damage."""

from __future__ import annotations

import gc
import json
import os
import pickle
import re
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from open_files import few_descriptors, held, mapped
from safetensors import safe_open

from python_training.data import store as store_module
from python_training.data.store import Store, mend, options_key


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.integers(-9, 9, 1001).astype(np.int16),
        "b:1.0000-2.0000": rng.standard_normal((2, 5, 3)).astype(np.float32),
        "c": rng.integers(0, 255, (5, 4, 3)).astype(np.uint8),
        "d": np.zeros((0, 3), np.float32),
    }


def test_what_is_added_is_read_back(tmp_path: Path) -> None:
    with Store(tmp_path / "s", {"x": 1}) as store:
        for key, value in arrays().items():
            store.add(key, value, note={"of": key})
        assert "a" in store and "z" not in store and len(set(store.keys())) == 4
        np.testing.assert_array_equal(store["a"], arrays()["a"])  # before it is written
    again = Store(tmp_path / "s")
    assert sorted(again.keys()) == sorted(arrays()) and again.notes["c"] == {"of": "c"}
    for key, value in arrays().items():
        np.testing.assert_array_equal(again[key], value)
        assert again[key].dtype == value.dtype and again.shape(key) == value.shape
    with pytest.raises(KeyError):
        again["z"]


def test_reading_is_a_memory_map(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        for key, value in arrays().items():
            store.add(key, value)
    again = Store(tmp_path)
    assert mapped(tmp_path) == 0
    view = again["b:1.0000-2.0000"]
    (shard,) = tmp_path.iterdir()
    assert mapped(tmp_path) == 1 and not held(tmp_path), "a view of the file that holds no descriptor"
    del again
    np.testing.assert_array_equal(view, arrays()["b:1.0000-2.0000"])
    del view
    gc.collect()
    assert mapped(tmp_path) == 0, "unmapped with the last array"
    again = Store(tmp_path)
    before = [p.read_bytes() for p in sorted(tmp_path.iterdir())]
    again["a"][:] = 0
    assert [p.read_bytes() for p in sorted(tmp_path.iterdir())] == before, "a reader never changes the file"


def total(store: Store) -> float:
    return sum(float(store[key].sum()) for key in store.keys())


_MINE: list[Store] = []


def keep(store: Store) -> None:
    _MINE[:] = [store]


def total_of_mine(_: int) -> float:
    return total(_MINE[0])


def test_more_shards_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 1)
    count = 60
    with few_descriptors(16):
        with Store(tmp_path) as store:
            for i in range(count):
                store.add(f"{i:03d}", np.full(5, i, np.float32))
        again = Store(tmp_path)
        views = [again[key] for key in again.keys()]
    assert len(list(tmp_path.iterdir())) == mapped(tmp_path) == count and not held(tmp_path)
    assert sorted(float(view[4]) for view in views) == list(range(count))


def test_workers_read_what_this_process_has_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 1)
    store = Store(tmp_path)
    for i in range(4):
        store.add(str(i), np.full(5, i, np.float32))
    assert total(store) == 30
    with get_context("fork").Pool(2, initializer=keep, initargs=(store,)) as pool:  # inherited with its maps
        assert pool.map(total_of_mine, range(8)) == [30] * 8
        assert pool.map(total, [store] * 2) == [30, 30], "sent: another process maps the files itself"
    sent = pickle.dumps(store)
    assert len(sent) < 2000 and total(pickle.loads(sent)) == total(store) == 30


def test_shards_are_bounded_and_readable_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 1000)
    with Store(tmp_path, {"rate": 16000}) as store:
        for i in range(10):
            store.add(str(i), np.full(150, i, np.float32))
    shards = sorted(tmp_path.iterdir())
    assert len(shards) == 5 and all(p.stat().st_mode & 0o777 == 0o666 & ~_umask() for p in shards)
    with safe_open(str(shards[0]), framework="numpy") as file:
        assert json.loads(file.metadata()["avser_fast_store"])["options"] == {"rate": 16000}
        assert all((file.get_tensor(k) == int(k)).all() for k in file.keys())


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_an_interruption_keeps_what_was_made(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Store(tmp_path) as store:
        store.add("a", np.zeros(3, np.float32))
        raise KeyboardInterrupt
    assert list(Store(tmp_path).keys()) == ["a"] and len(list(tmp_path.iterdir())) == 1


def test_two_writers_at_once(tmp_path: Path) -> None:
    first, second = Store(tmp_path), Store(tmp_path)
    for store in (first, second):
        store.add("a", np.ones(3, np.float32))
    second.add("b", np.ones(4, np.float32))
    first.flush()
    second.flush()
    again = Store(tmp_path)
    assert sorted(again.keys()) == ["a", "b"] and (again["a"] == 1).all()
    assert (first["a"] == 1).all()


def test_adding_twice_keeps_the_first_and_the_array_belongs_to_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("a", np.ones(3, np.float32))
    store.add("a", np.zeros(3, np.float32))
    assert (store["a"] == 1).all()
    own = np.ones(3, np.float32)
    store.add("own", own)
    with pytest.raises(ValueError, match="read-only"):
        own[:] = 0
    store["own"][:] = 2
    store.flush()
    assert (store["own"] == 1).all()
    with pytest.raises(TypeError, match="store: expected uint8, int16, float32, got float64"):
        store.add("b", np.ones(3))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "expected a safetensors file of .* bytes, got"),
        (lambda b: b[:5], "expected a whole safetensors file, got 5 bytes"),
        (lambda b: b"", "expected a whole safetensors file, got 0 bytes"),
        (lambda b: b[:8] + b"#" + b[9:], "expected the header of a safetensors file"),
        (lambda b: b.replace(b'"F32"', b'"F31"'), "expected the header of a safetensors file of U8, I16, F32"),
        (lambda b: b.replace(b"[30]", b"[31]"), "expected the header of a safetensors file"),
        (lambda b: b.replace(b"[0, 120]", b"[-8,112]"), "expected the header of a safetensors file"),
        (lambda b: b.replace(b'[30], "', b'[-5,-6],"'), "expected the header of a safetensors file"),
        (lambda b: b.replace(b'{"__metadata__"', b'["__metadata__"'), "expected the header of a safetensors file"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    with Store(tmp_path) as store:
        store.add("a", np.ones(30, np.float32))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    assert damage(whole) != whole  # type: ignore[operator]
    path.write_bytes(damage(whole))  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"{path}: {message}.*; prepare it again"):
        Store(tmp_path)
    other = tmp_path / "other.safetensors"
    other.write_bytes(whole)
    (found,) = mend(tmp_path).items()
    assert found[0] == path and re.match(message, found[1]) and not path.exists()
    assert Store(tmp_path)["a"].sum() == 30 and mend(tmp_path) == {}


def test_what_is_not_used_is_counted_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 80)
    for keys in ("ab", "cd", "ef", "ae"):  # two arrays of 40 bytes a shard, the last as another process might
        store = Store(tmp_path / keys, {"x": 1})
        for key in keys:
            store.add(key, np.full(10, ord(key), np.float32), note=key)
        for path in (tmp_path / keys).iterdir():
            path.rename(tmp_path / path.name)
        (tmp_path / keys).rmdir()
    store = Store(tmp_path)
    used = {"a", "c", "d", "e"}
    assert (
        len(set(store.keys())) == 6 and store.unused_bytes(set(store.keys())) == 80 and store.unused_bytes(used) == 160
    )
    view = store["a"]
    store.prune(used)
    again = Store(tmp_path)
    for found in (store, again):
        assert set(found.keys()) == used and found.unused_bytes(used) == 0
        assert all((found[key] == ord(key)).all() for key in used)
    assert (view == ord("a")).all(), "what is mapped stays"
    assert len(list(tmp_path.iterdir())) == 2 and {again.notes[key] for key in used} == used
    assert again.options == {"x": 1}
    again.prune(set())
    assert list(tmp_path.iterdir()) == []


def test_options_key() -> None:
    assert options_key({"a": 1, "b": 2.0}) == options_key({"b": 2.0, "a": 1}) != options_key({"a": 1, "b": 2.5})
