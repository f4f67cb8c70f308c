"""Loading an untrusted file runs no code."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

import acqcore
from acqcore.acquisitions.archive_novelty import NoveltyOptions
from acqsynth.artefacts import load_state
from acqsynth.callbacks import REWARD_STATE, RewardStates


class Runs:
    """Creates a folder when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def restore(path):
    RewardStates([]).restore(path.rename(path.with_name(REWARD_STATE)).parent)


LOADERS = {
    "a reward's state": (restore, pickle.UnpicklingError),
    "a step's state": (load_state, pickle.UnpicklingError),
    "a reference": (acqcore.Reference.load, ValueError),
    "an EPIG reference": (acqcore.EpigReference.load, ValueError),
    "an archive": (lambda path: NoveltyOptions(archive=path), ValueError),
}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("how", ["whole", "inside", "plain pickle", "no pickle"])
def test_a_crafted_file_runs_nothing(how, name, tmp_path):
    path, folder = tmp_path / "state.pt", tmp_path / "made"
    load, error = LOADERS[name]
    if how == "no pickle":
        path.write_bytes(b"\x80\x02not a pickle")
    elif how == "plain pickle":
        path.write_bytes(pickle.dumps(Runs(folder)))
    else:
        torch.save(Runs(folder) if how == "whole" else [{"values": Runs(folder)}], path)
    with pytest.raises(error):
        load(path)
    assert not folder.exists()
