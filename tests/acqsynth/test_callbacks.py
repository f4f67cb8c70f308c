"""Callbacks of the trainers, called as a trainer would: which checkpoints and students they keep and find again."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from acqsynth.callbacks import REWARD_STATE, Refresh, RewardStates, newest_checkpoint


class Refreshed:
    """Walks through the steps of a run that saves every ten steps and keeps two checkpoints."""

    def __init__(self, folder, every, checkpoints=None):
        self.used, self.folder, self.log = [], folder / "out", []
        student = lambda path: self.used.append(path.name)  # noqa: E731
        self.refresh = Refresh(every, checkpoints or self.folder, folder / "students", student, list)

    def steps(self, start, stop):
        for step in range(start + 1, stop + 1):
            state = SimpleNamespace(global_step=step, max_steps=1000, log_history=self.log, is_world_process_zero=True)
            self.refresh.on_step_end(None, state, None)
            if step % 10 == 0:
                model_checkpoint(self.folder, step)
                shutil.rmtree(self.folder / f"checkpoint-{step - 20}", ignore_errors=True)
                self.refresh.on_save(None, state, None)
                self.saved = self.refresh.state_dict()
        return self


def model_checkpoint(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("config.json", "trainer_state.json"):
        (path / name).write_text("{}")


@pytest.mark.parametrize(
    ("every", "killed", "student"),
    [(50, 95, "checkpoint-40"), (50, 45, None), (7, 108, "checkpoint-90"), (50, 115, "checkpoint-90"),
     (10, 35, "checkpoint-20"), (4, 27, "checkpoint-10"), (7, 200, "checkpoint-190")],
)  # fmt: skip
def test_the_student_of_the_last_checkpoint_is_found_again(tmp_path, every, killed, student):
    first = Refreshed(tmp_path, every).steps(0, killed)
    assert first.saved["student"] == student
    assert len(first.log) == len(first.used) == len(set(first.used))  # nothing is logged without a new student
    assert len(list((tmp_path / "students").glob("*"))) <= 2
    resumed = Refreshed(tmp_path, every)
    resumed.refresh.load_state_dict(first.saved)
    assert resumed.used == ([student] if student else [])
    resumed.steps(killed - killed % 10, killed)
    assert resumed.used[1 if student else 0 :] == first.used[len(first.used) - len(resumed.used) + bool(student) :]


def test_students_of_another_trainer_are_kept_until_the_next_save(tmp_path):
    """Their steps are not the generator's."""
    theirs = tmp_path / "theirs"
    first = Refreshed(tmp_path, 2, theirs)
    for step in range(0, 20, 2):
        model_checkpoint(theirs, 100 + step)
        first.steps(step, step + 2)
    assert (first.saved["student"], first.used[-1]) == ("checkpoint-118", "checkpoint-118")
    for step in (20, 22, 24):
        model_checkpoint(theirs, 100 + step)
        first.steps(step, step + 2)
    assert {path.name for path in (tmp_path / "students").iterdir()} == {"checkpoint-118", "checkpoint-124"}


def test_a_missing_student_is_an_error(tmp_path):
    refresh = Refresh(50, tmp_path, tmp_path / "students", print, list)
    with pytest.raises(FileNotFoundError, match=r"students/checkpoint-40: the student that the interrupted run"):
        refresh.load_state_dict({"student": "checkpoint-40", "first": [1.0]})


def test_a_checkpoint_without_a_model_yet_is_passed_over(tmp_path):
    (tmp_path / "out/checkpoint-40").mkdir(parents=True)
    (tmp_path / "out/checkpoint-40/config.json").write_text("{}")
    run = Refreshed(tmp_path, 50)
    run.refresh.on_step_end(None, SimpleNamespace(global_step=50, max_steps=99, log_history=run.log), None)
    assert run.used == run.log == []


def test_the_newest_checkpoint_that_is_whole(tmp_path):
    assert newest_checkpoint(tmp_path / "none", "config.json") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-last", "checkpoint-11"):
        (tmp_path / name).mkdir()
        if name != "checkpoint-11":  # this one is incomplete
            (tmp_path / name / "config.json").write_text("{}")
    assert newest_checkpoint(tmp_path, "config.json") == tmp_path / "checkpoint-10"


def test_rewards_with_a_state_are_restored(tmp_path, answer_reward):
    answer_reward.calls = 7
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    saved = RewardStates([print, answer_reward])
    args = SimpleNamespace(output_dir=tmp_path, save_only_model=False)
    saved.on_save(args, SimpleNamespace(is_world_process_zero=True, global_step=1), None)
    assert newest_checkpoint(tmp_path, REWARD_STATE) == folder
    fresh = type(answer_reward)()
    RewardStates([print, fresh]).restore(folder)
    assert fresh.calls == 7
    told = "expected the state of 2 rewards and refreshes, got 1, from an older version or another reward; remove"
    with pytest.raises(ValueError, match=told):
        RewardStates([fresh, fresh]).restore(folder)


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="every: expected an int >= 1, got 0"):
        Refresh(0, tmp_path, tmp_path, print, list)
