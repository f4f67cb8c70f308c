"""Steps: skipping, resuming, atomic replacement and messages to the user."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from acqsynth import steps
from acqsynth.artefacts import read_json, read_rows, read_table, write_json, write_rows
from acqsynth.config import Section, Source
from acqsynth.domains import Sample
from acqsynth.steps import Model, Step, StepError, Store, seconds_of

ran: Counter[str] = Counter()


class Options(Section):
    rate: float = 0.1
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True)
class Holder:
    """Nests steps; they are found inside dataclasses, lists and mappings."""

    parts: Any


@pytest.fixture(autouse=True)
def _clear():
    ran.clear()


def text(context, *, value, options=None, **rest):
    ran["text"] += 1
    (context.folder / "text.txt").write_text(value)


def upper(context, *, held):
    ran["upper"] += 1
    [path] = held.parts["texts"]
    (context.folder / "upper").mkdir(exist_ok=True)
    (context.folder / "upper" / "text.txt").write_text(path.read_text().upper())


def reader(first, path="text.txt", function=upper):
    return Step("train", "b", function, {"held": Holder({"texts": [first / path]})})


def pair(value, **options):
    first = Step("seeds", "a", text, {"value": value, **options})
    return first, reader(first)


def test_a_step_runs_its_inputs_first_and_once(tmp_path):
    first, second = pair("x")
    store = Store(tmp_path)
    assert store.run(second)
    assert (tmp_path / "01-train/b/upper/text.txt").read_text() == "X"
    assert not store.run(first)
    assert not Store(tmp_path).run(second)
    assert ran == {"text": 1, "upper": 1}
    manifest = json.loads((tmp_path / "00-seeds/a/stage.json").read_text())
    assert list(manifest) == ["layout", "made_from", "artefacts", "seconds"]
    assert manifest["artefacts"]["text.txt"][0] == 1
    assert manifest["made_from"]["settings"]["value"] == "x"
    assert seconds_of(tmp_path / "01-train/b") == read_json(tmp_path / "01-train/b/stage.json")["seconds"] >= 0
    assert store.path(second / "upper") == tmp_path / "01-train/b/upper"


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ({"value": "x"}, {"value": "y"}, "value changed"),
        ({"value": "x", "options": Options()}, {"value": "x", "options": Options(rate=0.2)}, "options.rate changed"),
        ({"value": "x"}, {"value": "x", "options": Options()}, "options changed"),
        ({"value": "x", "gates": []}, {"value": "x", "gates": None}, "gates changed"),
        ({"value": "x", "more": {"a": [], "b": 1}}, {"value": "x", "more": {"b": 2}}, "more.b changed"),
        ({"value": "x", "more": {}}, {"value": "x"}, "more changed"),
        ({"value": "x", "replay": 1}, {"value": "x", "replay": 2}, "replay changed"),
    ],
)
def test_changed_settings_run_again_and_are_named(tmp_path, before, after, reason):
    Store(tmp_path).run(Step("seeds", "a", text, before))
    step = Step("seeds", "a", text, after)
    store = Store(tmp_path)
    assert store.reason(step) == reason
    assert store.run(step)
    assert store.reason(step) is None
    assert Store(tmp_path).reason(step) is None


def test_an_input_that_comes_out_the_same_spares_what_reads_it(tmp_path):
    Store(tmp_path).run(pair("x")[1])
    _, again = pair("x", options=Options())
    store = Store(tmp_path)
    assert store.reason(again) == "00-seeds/a, which it reads, has to run"
    assert not store.run(again)
    assert ran == {"text": 2, "upper": 1}
    _, other = pair("y")
    assert Store(tmp_path).run(other)
    assert (tmp_path / "01-train/b/upper/text.txt").read_text() == "Y"


def test_a_missing_or_cut_artefact_runs_again(tmp_path):
    step, _ = pair("long text")
    Store(tmp_path).run(step)
    (tmp_path / "00-seeds/a/text.txt").write_text("long")
    assert Store(tmp_path).reason(step) == "text.txt is missing or truncated"
    (tmp_path / "00-seeds/a/text.txt").unlink()
    assert Store(tmp_path).run(step)
    assert (tmp_path / "00-seeds/a/text.txt").read_text() == "long text"


def test_an_edited_artefact_is_made_again(tmp_path):
    step, _ = pair("long text")
    Store(tmp_path).run(step)
    path = tmp_path / "00-seeds/a/text.txt"
    os.utime(path, (time.time() + 9,) * 2)  # copied or touched
    assert Store(tmp_path).reason(step) is None
    path.write_text("lone text")
    os.utime(path, (time.time() + 9,) * 2)
    assert Store(tmp_path).reason(step) == "text.txt was edited"
    Store(tmp_path).run(step)
    assert path.read_text() == "long text"


def test_a_copy_without_times_is_hashed_once(tmp_path, monkeypatch):
    step, _ = pair("long text")
    Store(tmp_path).run(step)
    path = tmp_path / "00-seeds/a/text.txt"
    os.utime(path.with_name("stage.json"), (time.time() - 9,) * 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", Mock(side_effect=PermissionError))
        assert Store(tmp_path).reason(step) is None
    digest = Mock(side_effect=steps._sha256)
    monkeypatch.setattr(steps, "_sha256", digest)
    assert [Store(tmp_path).reason(step) for _ in range(3)] == [None] * 3
    digest.assert_called_once_with(path)
    path.write_text("lone text")
    assert Store(tmp_path).reason(step) == "text.txt was edited"


def test_a_copy_from_a_clock_that_is_ahead_hides_no_edit(tmp_path):
    step, _ = pair("long text")
    Store(tmp_path).run(step)
    path = tmp_path / "00-seeds/a/text.txt"
    os.utime(path, (time.time() + 99,) * 2)
    assert Store(tmp_path).reason(step) is None
    path.write_text("lone text")
    assert Store(tmp_path).reason(step) == "text.txt was edited"


def test_outside_files_count_by_content_and_folders_by_their_files(tmp_path):
    file, folder = tmp_path / "rows.jsonl", tmp_path / "model"
    file.write_text("1")
    folder.mkdir()
    (folder / "weights").write_text("1")
    (folder / "config.json").write_text("{}")
    outside = {"model": Model(str(folder)), "hub": Model("a/hub-id"), "rows": Source(source=str(file))}
    step = Step("seeds", "a", text, {"value": "x", **outside})
    Store(tmp_path).run(step)
    os.utime(file, (1, 1))
    assert Store(tmp_path).reason(step) is None
    file.write_text("2")
    assert Store(tmp_path).reason(step) == f"{file} changed"
    file.write_text("1")
    (folder / "weights").write_text("22")
    assert Store(tmp_path).reason(step) == f"{folder} changed"


def test_intents_count_by_the_content_of_their_file(tmp_path, monkeypatch):
    files = [tmp_path / place / "intents" / "x.jsonl" for place in ("here", "there")]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("1")
    step = Step("seeds", "a", text, {"value": "x", "rows": Source(source="intents:x")})
    monkeypatch.setenv("ACQCORE_DATA", str(tmp_path / "here"))
    Store(tmp_path / "run").run(step)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ACQCORE_DATA", "~/there")
    assert Store(tmp_path / "run").reason(step) is None
    files[1].write_text("2")
    assert Store(tmp_path / "run").reason(step) == "intents:x changed"


def test_what_a_step_was_never_given_is_missing(tmp_path):
    first, _ = pair("x")
    with pytest.raises(StepError, match=r"00-seeds/a/other\.txt was not written"):
        Store(tmp_path).run(reader(first, "other.txt"))


def raising(error):
    def function(context, **arguments):
        (context.folder / "half.txt").write_text("half")
        raise error

    return function


def full(cause=None):
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
        OSError(errno.EFBIG, "File too large"),
        Exception("Error while serializing: I/O error: File too large (os error 27)"),
    ],
    ids=["enospc", "quota", "torch", "safetensors", "efbig", "ulimit"],
)
def test_a_full_disk_is_one_sentence_and_earlier_outputs_stay(tmp_path, error):
    first, _ = pair("x")
    Store(tmp_path).run(first)
    before = (tmp_path / "00-seeds/a/stage.json").read_bytes()
    failing = reader(first, function=raising(error))
    with pytest.raises(StepError) as caught:
        Store(tmp_path).run(failing)
    assert str(caught.value).startswith(f"01-train/b: no space left for {tmp_path} (")
    assert str(caught.value).endswith("free some and run the same command again, finished steps are kept")
    assert not (tmp_path / "01-train/b").exists()
    assert (tmp_path / "00-seeds/a/stage.json").read_bytes() == before
    assert Store(tmp_path).reason(first) is None


def test_a_checkpoint_on_a_full_disk_is_one_sentence(tmp_path):
    step = Step("seeds", "a", lambda context: torch.save(torch.zeros(300_000), "/dev/full"))
    with pytest.raises(StepError, match="00-seeds/a: no space left for"):
        Store(tmp_path).run(step)


def test_a_disk_that_really_fills_up(tmp_path):
    """Runs on a file system of 1 MiB; skipped if this user may not mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        first, _ = pair("x")
        Store(place).run(first)

        def large(context, held):
            (context.folder / "large.bin").write_bytes(bytes(2 << 20))

        with pytest.raises(StepError, match=r"01-train/b: no space left for .* \(0 MiB free\)"):
            Store(place).run(reader(first, function=large))
        assert Store(place).reason(first) is None
        assert not (place / "01-train/b").exists()
        # After space is freed, the step succeeds.
        (place / "01-train/b.partial/large.bin").unlink()
        assert Store(place).run(reader(first))
    finally:
        subprocess.run(["umount", place], check=True)


def test_the_old_artefacts_stay_until_the_new_ones_are_whole(tmp_path):
    Store(tmp_path).run(Step("seeds", "a", text, {"value": "x"}))
    with pytest.raises(StepError, match="00-seeds/a: ValueError: bad row 3"):
        Store(tmp_path).run(Step("seeds", "a", raising(ValueError("bad\nrow 3"))))
    assert (tmp_path / "00-seeds/a/text.txt").read_text() == "x"


@pytest.mark.parametrize("error", [KeyError("x"), ZeroDivisionError(), KeyboardInterrupt()])
def test_what_the_user_can_not_mend_is_not_dressed_up(tmp_path, error):
    with pytest.raises(type(error)):
        Store(tmp_path).run(Step("seeds", "a", raising(error)))


def chunked(context, *, size, fail_at):
    def double(start, items):
        if start == fail_at:
            raise ValueError("stop")
        ran["chunk"] += 1
        return [2 * item for item in items]

    context.write("doubled.json", [n for chunk in context.chunks("n", list(range(10)), size, double) for n in chunk])


def test_finished_chunks_are_not_done_again(tmp_path):
    fail = [6]

    def once(context, *, size):
        chunked(context, size=size, fail_at=fail[0])

    step = Step("seeds", "a", once, {"size": 3})
    with pytest.raises(StepError, match="ValueError: stop"):
        Store(tmp_path).run(step)
    assert ran["chunk"] == 2
    assert Store(tmp_path).reason(step) == "was interrupted, resumes"
    fail[0] = None
    Store(tmp_path).run(step)
    assert ran["chunk"] == 4
    assert json.loads((tmp_path / "00-seeds/a/doubled.json").read_text()) == [2 * n for n in range(10)]
    assert not (tmp_path / "00-seeds/a/work").exists()


def test_partial_work_of_other_settings_is_not_taken(tmp_path):
    def once(context, *, size, fail_at):
        chunked(context, size=size, fail_at=fail_at)

    with pytest.raises(StepError):
        Store(tmp_path).run(Step("seeds", "a", once, {"size": 3, "fail_at": 6}))
    step = Step("seeds", "a", once, {"size": 2, "fail_at": None})
    assert Store(tmp_path).reason(step) == "never ran"
    Store(tmp_path).run(step)
    assert ran["chunk"] == 2 + 5


def test_a_kill_between_the_end_and_the_rename_loses_nothing(tmp_path):
    step, _ = pair("x")
    Store(tmp_path).run(step)
    (tmp_path / "00-seeds/a").rename(tmp_path / "00-seeds/a.partial")
    assert not Store(tmp_path).run(step)
    assert ran["text"] == 1
    assert (tmp_path / "00-seeds/a/text.txt").is_file()


def test_a_kill_while_the_record_is_written_leaves_no_artefact(tmp_path):
    step, _ = pair("x")
    Store(tmp_path).run(step)
    (tmp_path / "00-seeds/a").rename(partial := tmp_path / "00-seeds/a.partial")
    record = read_json(partial / "stage.json")
    write_json(partial / "stage.json", {key: record[key] for key in ("layout", "made_from")})
    (partial / "stage.json.tmp").write_text('{"layout')
    assert Store(tmp_path).run(step)
    assert list(read_json(tmp_path / "00-seeds/a/stage.json")["artefacts"]) == ["text.txt"]
    assert not Store(tmp_path).run(step)


class Seen:
    """Counts the items of all chunks so far."""

    def __init__(self):
        self.seen = 0

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.parametrize("fail_at", [0, 2, 4, 8])
def test_state_is_restored_before_the_first_chunk_that_is_computed(tmp_path, fail_at):
    fail = [fail_at]

    def work(context):
        counter = Seen()

        def count(start, items):
            if start == fail[0]:
                raise ValueError("stop")
            before, counter.seen = counter.seen, counter.seen + len(items)
            return before

        context.write("seen.json", list(context.chunks("n", list(range(10)), 2, count, counter)))

    step = Step("seeds", "a", work)
    with pytest.raises(StepError, match="stop"):
        Store(tmp_path).run(step)
    fail[0] = None
    Store(tmp_path).run(step)
    assert json.loads((tmp_path / "00-seeds/a/seen.json").read_text()) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("folder", ["00-seeds/a", "00-seeds/a.partial"])
def test_a_run_of_an_older_layout_is_refused(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "stage.json").write_text('{"inputs": {}, "artefacts": {}, "seconds": 1.0}')
    told = f"^output: {tmp_path} holds a run of an older version; remove it or set another output$"
    for ask in (Store(tmp_path).reason, Store(tmp_path).run):
        with pytest.raises(StepError, match=told):
            ask(pair("x")[0])


@pytest.mark.parametrize(
    "record",
    [
        "{",
        "[1]",
        "null",
        '{"layout": 3}',
        '{"layout": 3, "made_from": []}',
        "\0",
        '{"layout": 3, "made_from": {}, "artefacts": {"x": 3}}',
    ],
)
def test_a_damaged_record_is_one_sentence(tmp_path, record):
    Store(tmp_path).run(Step("seeds", "a", text, {"value": "x"}))
    (tmp_path / "00-seeds/a/stage.json").write_text(record)
    told = f"^{tmp_path}/00-seeds/a/stage.json is damaged; remove the folder {tmp_path}/00-seeds/a and run again$"
    with pytest.raises(StepError, match=told):
        Store(tmp_path).run(Step("seeds", "a", text, {"value": "x"}))


def test_an_unknown_model_is_one_sentence(tmp_path):
    step = Step("seeds", "a", text, {"value": "x", "model": Model(str(tmp_path))})
    with pytest.raises(StepError, match=rf"00-seeds/a: model: {tmp_path} holds no model \(no config.json\)"):
        Store(tmp_path / "out").run(step)


def test_rows_are_read_as_written(tmp_path):
    samples = [Sample("1+1", "2", "so", {"skill": "add"}), Sample("a\nb", "ü")]
    write_rows(tmp_path / "rows.parquet", samples, {"reward": [0.5, None]})
    assert read_rows(tmp_path / "rows.parquet") == samples
    assert read_table(tmp_path / "rows.parquet")["reward"] == [0.5, None]


def test_two_runs_do_not_write_one_folder(tmp_path):
    told = f"output: another run is using {tmp_path}"
    with Store(tmp_path).locked(), pytest.raises(StepError, match=told), Store(tmp_path).locked():
        pass
    with Store(tmp_path).locked():
        pass


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StepError, match=r"output: cannot write to .*file/out"), Store(tmp_path / "file/out").locked():
        pass


def test_json_is_whole_and_finite(tmp_path):
    write_json(tmp_path / "x.json", {"a": "ü"})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "ü"}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "ü"}
    for damaged in (b"\0\0\0", b'{"a": "\xff"}', b""):
        (tmp_path / "x.json").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.json: not readable: "):
            read_json(tmp_path / "x.json")


def test_a_killed_process_goes_on_with_its_chunks(tmp_path):
    output, log = tmp_path / "out", tmp_path / "log.txt"
    slow = True

    def job(context):
        def copy(start, items):
            with log.open("a") as file:
                file.write(f"{start}\n")
            if slow and start == 4:
                time.sleep(300)
            return list(items)

        context.write("all.json", [n for chunk in context.chunks("n", list(range(8)), 2, copy) for n in chunk])

    def run():
        with Store(output).locked():
            Store(output).run(Step("seeds", "a", job))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    deadline = time.monotonic() + 300
    while not (log.exists() and "4" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (output / "00-seeds/a").exists()
    slow = False
    run()
    assert log.read_text().split() == ["0", "2", "4", "4", "6"]
    assert json.loads((output / "00-seeds/a/all.json").read_text()) == list(range(8))
