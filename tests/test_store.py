"""The store of arrays: shards, memory maps, interruption, damage."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from python_training.data import store as store_module
from python_training.data.store import Store, options_key


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
        assert "a" in store and "z" not in store and len(store) == 4
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
    base = again["b:1.0000-2.0000"]
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert isinstance(base, mmap.mmap), "a view of the file, not a copy"
    before = [p.read_bytes() for p in sorted(tmp_path.iterdir())]
    again["a"][:] = 0
    assert [p.read_bytes() for p in sorted(tmp_path.iterdir())] == before, "a reader never changes the file"


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


def test_adding_twice_keeps_the_first_and_the_caller_s_array_is_not_held(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add("a", np.ones(3, np.float32))
    store.add("a", np.zeros(3, np.float32))
    assert (store["a"] == 1).all()
    own = np.ones(3, np.float32)
    store.add("own", own)
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
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    with Store(tmp_path) as store:
        store.add("a", np.ones(30, np.float32))
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        Store(tmp_path)


def test_options_key() -> None:
    assert options_key({"a": 1, "b": 2.0}) == options_key({"b": 2.0, "a": 1}) != options_key({"a": 1, "b": 2.5})
