"""Units: skipped, resumed, replaced whole or not at all, and what the user is told."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from acqsynth.stages.unit import Artefact, StageError, Store, Unit, Work, seconds_of, write_json

ran: Counter[str] = Counter()


@dataclass(frozen=True)
class Options:
    rate: float = 0.1
    names: tuple[str, ...] = ("a",)


@pytest.fixture(autouse=True)
def _clear() -> None:
    ran.clear()


def text(work: Work, *, value: str, options: Options | None = None) -> None:
    ran["text"] += 1
    (work.folder / "text.txt").write_text(value)


def upper(work: Work) -> None:
    ran["upper"] += 1
    (work.folder / "upper").mkdir(exist_ok=True)
    (work.folder / "upper" / "text.txt").write_text(work.inputs["text"].read_text().upper())


def pair(value: str, **options: Any) -> tuple[Unit, Unit]:
    first = Unit("seeds", "a", text, {"value": value, **options})
    return first, Unit("train", "b", upper, {}, {"text": first / "text.txt"})


def test_a_unit_runs_its_inputs_first_and_once(tmp_path: Path) -> None:
    first, second = pair("x")
    store = Store(tmp_path)
    assert store.run(second)
    assert (tmp_path / "01-train/b/upper/text.txt").read_text() == "X"
    assert not store.run(first)
    assert not Store(tmp_path).run(second)
    assert ran == {"text": 1, "upper": 1}
    manifest = json.loads((tmp_path / "00-seeds/a/stage.json").read_text())
    assert list(manifest) == ["inputs", "artefacts", "seconds"]
    assert manifest["artefacts"]["text.txt"][0] == 1
    assert manifest["inputs"]["settings"]["value"] == "x"
    assert seconds_of(tmp_path / "01-train/b/upper/text.txt") >= 0
    assert store.path(second / "upper") == tmp_path / "01-train/b/upper"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"value": "x"}, {"value": "y"}, "value changed"),
        ({"value": "x", "options": Options()}, {"value": "x", "options": Options(rate=0.2)}, "options.rate changed"),
        ({"value": "x"}, {"value": "x", "options": Options()}, "options changed"),
    ],
)
def test_changed_settings_run_again_and_are_named(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], reason: str
) -> None:
    Store(tmp_path).run(Unit("seeds", "a", text, before))
    unit = Unit("seeds", "a", text, after)
    store = Store(tmp_path)
    assert store.why(unit) == reason
    assert store.run(unit)
    assert store.why(unit) is None
    assert Store(tmp_path).why(unit) is None


def test_an_input_that_comes_out_the_same_spares_what_reads_it(tmp_path: Path) -> None:
    Store(tmp_path).run(pair("x")[1])
    _, again = pair("x", options=Options())
    store = Store(tmp_path)
    assert store.why(again) == "00-seeds/a, which it reads, has to run"
    assert not store.run(again)
    assert ran == {"text": 2, "upper": 1}
    _, other = pair("y")
    assert Store(tmp_path).run(other)
    assert (tmp_path / "01-train/b/upper/text.txt").read_text() == "Y"


def test_a_missing_or_cut_artefact_runs_again(tmp_path: Path) -> None:
    unit, _ = pair("long text")
    Store(tmp_path).run(unit)
    (tmp_path / "00-seeds/a/text.txt").write_text("long")
    assert Store(tmp_path).why(unit) == "text.txt is missing or was cut"
    (tmp_path / "00-seeds/a/text.txt").unlink()
    assert Store(tmp_path).run(unit)
    assert (tmp_path / "00-seeds/a/text.txt").read_text() == "long text"


def test_outside_files_count_by_content_and_folders_by_their_files(tmp_path: Path) -> None:
    file, folder = tmp_path / "rows.jsonl", tmp_path / "model"
    file.write_text("1")
    folder.mkdir()
    (folder / "weights").write_text("1")
    unit = Unit("seeds", "a", text, {"value": "x"}, outside=(str(file), str(folder), "a/hub-id"))
    Store(tmp_path).run(unit)
    os.utime(file, (1, 1))
    assert Store(tmp_path).why(unit) is None
    file.write_text("2")
    assert Store(tmp_path).why(unit) == f"{file} changed"
    file.write_text("1")
    (folder / "weights").write_text("22")
    assert Store(tmp_path).why(unit) == f"{folder} changed"


def test_what_a_unit_was_never_given_is_missing(tmp_path: Path) -> None:
    first, _ = pair("x")
    reader = Unit("train", "b", upper, {}, {"text": Artefact(first, "other.txt")})
    with pytest.raises(StageError, match=r"00-seeds/a/other\.txt was not written"):
        Store(tmp_path).run(reader)


def raising(error: BaseException) -> Callable[..., None]:
    def function(work: Work) -> None:
        (work.folder / "half.txt").write_text("half")
        raise error

    return function


def full(cause: BaseException | None = None) -> OSError:
    error = OSError(errno.ENOSPC, "No space left on device")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        full(),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/1"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["enospc", "quota", "torch", "safetensors"],
)
def test_a_full_disk_is_one_sentence_and_earlier_outputs_stay(tmp_path: Path, error: Exception) -> None:
    first, _ = pair("x")
    Store(tmp_path).run(first)
    before = (tmp_path / "00-seeds/a/stage.json").read_bytes()
    failing = Unit("train", "b", raising(error), {}, {"text": first / "text.txt"})
    with pytest.raises(StageError) as caught:
        Store(tmp_path).run(failing)
    assert str(caught.value).startswith(f"01-train/b: no space left for {tmp_path} (")
    assert str(caught.value).endswith("free some and run the same command again, finished stages are kept")
    assert not (tmp_path / "01-train/b").exists()
    assert (tmp_path / "00-seeds/a/stage.json").read_bytes() == before
    assert Store(tmp_path).why(first) is None


def test_a_disk_that_really_fills_up(tmp_path: Path) -> None:
    """On a file system of one MiB, where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system can not be mounted here")
    try:
        first, _ = pair("x")
        Store(place).run(first)

        def large(work: Work) -> None:
            (work.folder / "large.bin").write_bytes(bytes(2 << 20))

        with pytest.raises(StageError, match=r"01-train/b: no space left for .* \(0 MiB free\)"):
            Store(place).run(Unit("train", "b", large, {}, {"text": first / "text.txt"}))
        assert Store(place).why(first) is None
        assert not (place / "01-train/b").exists()
        # Space is made, and the same unit goes on.
        (place / "01-train/b.partial/large.bin").unlink()
        assert Store(place).run(Unit("train", "b", upper, {}, {"text": first / "text.txt"}))
    finally:
        subprocess.run(["umount", place], check=True)


def test_the_old_artefacts_stay_until_the_new_ones_are_whole(tmp_path: Path) -> None:
    Store(tmp_path).run(Unit("seeds", "a", text, {"value": "x"}))
    with pytest.raises(StageError, match="00-seeds/a: ValueError: bad row 3"):
        Store(tmp_path).run(Unit("seeds", "a", raising(ValueError("bad\nrow 3"))))
    assert (tmp_path / "00-seeds/a/text.txt").read_text() == "x"


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), KeyboardInterrupt()])
def test_what_the_user_can_not_mend_is_not_dressed_up(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        Store(tmp_path).run(Unit("seeds", "a", raising(error)))


def chunked(work: Work, *, size: int, fail_at: int | None) -> None:
    def double(start: int, items: Any) -> list[int]:
        if start == fail_at:
            raise ValueError("stop")
        ran["chunk"] += 1
        return [2 * item for item in items]

    work.write("doubled.json", [n for chunk in work.chunks("n", list(range(10)), size, double) for n in chunk])


def test_finished_chunks_are_not_done_again(tmp_path: Path) -> None:
    fail: list[int | None] = [6]

    def once(work: Work, *, size: int) -> None:
        chunked(work, size=size, fail_at=fail[0])

    unit = Unit("seeds", "a", once, {"size": 3})
    with pytest.raises(StageError, match="ValueError: stop"):
        Store(tmp_path).run(unit)
    assert ran["chunk"] == 2
    assert Store(tmp_path).why(unit) == "was cut off, goes on"
    fail[0] = None
    Store(tmp_path).run(unit)
    assert ran["chunk"] == 4
    assert json.loads((tmp_path / "00-seeds/a/doubled.json").read_text()) == [2 * n for n in range(10)]
    assert not (tmp_path / "00-seeds/a/work").exists()


def test_partial_work_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    def once(work: Work, *, size: int, fail_at: int | None) -> None:
        chunked(work, size=size, fail_at=fail_at)

    with pytest.raises(StageError):
        Store(tmp_path).run(Unit("seeds", "a", once, {"size": 3, "fail_at": 6}))
    unit = Unit("seeds", "a", once, {"size": 2, "fail_at": None})
    assert Store(tmp_path).why(unit) == "never ran"
    Store(tmp_path).run(unit)
    assert ran["chunk"] == 2 + 5


def test_a_kill_between_the_end_and_the_rename_loses_nothing(tmp_path: Path) -> None:
    unit, _ = pair("x")
    Store(tmp_path).run(unit)
    (tmp_path / "00-seeds/a").rename(tmp_path / "00-seeds/a.partial")
    assert not Store(tmp_path).run(unit)
    assert ran["text"] == 1
    assert (tmp_path / "00-seeds/a/text.txt").is_file()


def test_two_runs_do_not_write_one_folder(tmp_path: Path) -> None:
    told = f"output: another run is at work in {tmp_path}"
    with Store(tmp_path).locked(), pytest.raises(StageError, match=told), Store(tmp_path).locked():
        pass
    with Store(tmp_path).locked():
        pass


def test_a_folder_that_can_not_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StageError, match=r"output: .*file/out can not be written"),
        Store(tmp_path / "file/out").locked(),
    ):
        pass


def test_json_is_whole_and_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": "ü"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "ü"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "ü"}


def test_a_killed_process_goes_on_with_its_chunks(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, time
            from pathlib import Path
            from acqsynth.stages.unit import Store, Unit

            def job(work):
                def slow(start, items):
                    with open("log.txt", "a") as log:
                        log.write(f"{start}\\n")
                    if sys.argv[1] == "slow" and start == 4:
                        time.sleep(60)
                    return list(items)
                work.write("all.json", [n for c in work.chunks("n", list(range(8)), 2, slow) for n in c])

            with Store(Path("out")).locked():
                Store(Path("out")).run(Unit("seeds", "a", job))
            """
        )
    )
    process = subprocess.Popen([sys.executable, script, "slow"], cwd=tmp_path)
    deadline = time.monotonic() + 60
    log = tmp_path / "log.txt"
    while not (log.exists() and "4" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out/00-seeds/a").exists()
    subprocess.run([sys.executable, script, "fast"], cwd=tmp_path, check=True, timeout=60)
    assert log.read_text().split() == ["0", "2", "4", "4", "6"]
    assert json.loads((tmp_path / "out/00-seeds/a/all.json").read_text()) == list(range(8))
    shutil.rmtree(tmp_path / "out")
