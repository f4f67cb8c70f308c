"""Finished batches and blocks on disk survive a kill and belong to a single run."""

from __future__ import annotations

from pathlib import Path

import pytest

from acqcore.files.parts import Parts

NAN = float("nan")


@pytest.fixture
def parts(tmp_path):
    parts = Parts(tmp_path / "o.csv")
    parts.claim({"a": 1})
    return parts


def test_batches_come_back(parts, tmp_path):
    assert parts.load(0) == {}
    parts.append(0, [3, 1], [[0.1, 2.0], [1 / 3, NAN]])
    parts.append(0, [2], [[5.0, 6.0]])
    parts.append(1, [0], [[7.0, 8.0]])
    parts.release()
    again = Parts(tmp_path / "o.csv")
    again.claim({"a": 1})
    done = again.load(0)
    assert sorted(done) == [1, 2, 3]
    assert done[3] == ([0.1, 2.0], [])
    assert done[1][0][0] == 1 / 3
    assert again.load(1) == {0: ([7.0, 8.0], [])}
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_line_is_cut_off(parts):
    parts.append(0, [1], [[1.0]])
    path = parts.folder / "block-000000.batches"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"rows": [2], "val')
    assert parts.load(0) == {1: ([1.0], [])}
    assert path.read_bytes() == whole
    parts.append(0, [2], [[2.0]])
    assert parts.load(0) == {1: ([1.0], []), 2: ([2.0], [])}


def test_another_run_is_refused(tmp_path):
    first = Parts(tmp_path / "o.csv")
    first.claim({"a": 1, "b": [1, 2]})
    first.release()
    with pytest.raises(ValueError, match=r"holds an interrupted run with different b \(\[1, 2\] there, \[1\] here\)"):
        Parts(tmp_path / "o.csv").claim({"a": 1, "b": [1]})


def test_a_block_is_finished_with_its_report(parts):
    parts.append(7, [0], [[1.0]])
    assert not parts.finished(7)
    assert parts.report(7) is None
    parts.finish(7, {"rows": 1})
    assert parts.finished(7)
    assert Parts(parts.folder.with_name("o.csv")).report(7) == {"rows": 1}
    assert parts.load(7) == {}  # its rows are in the written block
    assert not parts.finished(0)


def test_blocks_are_written_in_the_outputs_format(tmp_path):
    assert Parts(tmp_path / "o.csv").path(12).name == "block-000012.csv"
    assert Parts(tmp_path / "folder").path(0) == tmp_path / "folder.parts" / "block-000000.parquet"


def test_attempts_are_counted_across_processes_of_one_run(parts):
    assert [parts.attempt(3), parts.attempt(3), parts.attempt(4)] == [1, 2, 1]
    parts.fail(3, "ValueError: no\n\nTraceback")
    other = Parts(parts.folder.with_name("o.csv"))
    assert other.attempt(3) == 3
    assert other.failure(3).read_text().splitlines()[0] == "ValueError: no"
    parts.release()
    other.claim({"a": 1})  # the same command again
    assert other.attempt(3) == 1
    assert not other.failure(3).exists()


def test_only_an_unused_folder_is_removed_unasked(parts):
    parts.append(0, [1], [[1.0]])
    parts.remove_unused()
    assert parts.load(0) == {1: ([1.0], [])}
    (parts.folder / "block-000000.batches").unlink()
    parts.remove_unused()
    assert not parts.folder.exists()


@pytest.mark.parametrize("n_removed", range(5))
def test_a_run_killed_while_it_removes_its_files(n_removed, parts, tmp_path, monkeypatch):
    """Another run takes over nothing from what is left, and leaves nothing itself."""
    for block in range(2):
        parts.path(block).touch()
        parts.finish(block, {"rows": 1})
    unlink, removed = Path.unlink, []

    def until_killed(path, **options):
        if len(removed) == n_removed:
            raise KeyboardInterrupt
        removed.append(path)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", until_killed)
        with pytest.raises(KeyboardInterrupt):
            parts.remove()
    parts.release()
    other = Parts(tmp_path / "o.csv")
    if n_removed:
        other.claim({"a": 2})
        assert not any(map(other.finished, range(2)))
    else:
        other.claim({"a": 1})
        assert all(other.finished(block) and other.path(block).exists() for block in range(2))
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time(parts, tmp_path):
    other = Parts(tmp_path / "o.csv")
    with pytest.raises(ValueError, match="out: another process is writing to"):
        other.claim({"a": 1})
    (parts.folder / "manifest.json").unlink()  # as before it is written
    with pytest.raises(ValueError, match="out: another process is writing to"):
        other.remove_unclaimed()
    assert parts.folder.exists()
    parts.release()
    Parts(tmp_path / "o.csv").claim({"a": 1})


@pytest.mark.parametrize("name", ["notes.txt", "deep/notes.txt", "part-000000.parquet"])
def test_files_of_others_are_left_alone(name, tmp_path):
    """A folder that was not left by a run is refused, and foreign files in a run's folder are kept."""
    path = tmp_path / "o.csv.parts" / name
    path.parent.mkdir(parents=True)
    path.write_text("keep")
    parts = Parts(tmp_path / "o.csv")
    with pytest.raises(ValueError, match="exists and was not left by a run"):
        parts.claim({"a": 1})
    assert not parts.begun
    path.unlink()
    for folder in (path.parent, parts.folder):
        if folder.exists():
            folder.rmdir()
    parts.claim({"a": 1})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("keep")
    parts.remove()
    assert path.read_text() == "keep"
    assert not parts.begun


def test_a_manifest_that_is_not_readable(tmp_path):
    folder = tmp_path / "o.csv.parts"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"a"')
    with pytest.raises(ValueError, match=r"manifest\.json is not readable; remove its folder"):
        Parts(tmp_path / "o.csv").claim({"a": 1})
