"""Loading models, tokenizers and students from folders and hub ids."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import acqcore


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda path: acqcore.load_model(None), TypeError, "path: expected a folder or hub id, got NoneType"),
        (lambda path: acqcore.Student.load(None), TypeError, "path: expected a folder or hub id, got NoneType"),
        (lambda path: acqcore.load_tokenizer(3), TypeError, "path: expected a folder or hub id, got int"),
        (lambda path: acqcore.load_model(path, "fp8"), ValueError, "dtype: unknown 'fp8'"),
        (lambda path: acqcore.load_model("/no/model"), OSError, "'/no/model' is not a local folder"),
    ],
)
def test_wrong_arguments_of_loading(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)


class TestLoad:
    def test_from_a_folder(self, tmp_path, tiny_model, tokenizer, monkeypatch):
        model = tiny_model("Qwen2")
        model.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        student = acqcore.Student.load(tmp_path)
        assert student.tokenizer("a fox").input_ids == tokenizer("a fox").input_ids
        ids = {"input_ids": torch.arange(2, 20)[None]}
        assert torch.equal(acqcore.score(student, ids, "loss")["loss"], acqcore.score(model, ids, "loss")["loss"])
        monkeypatch.setenv("HOME", str(tmp_path.parent))
        assert acqcore.Student.load(f"~/{tmp_path.name}", dtype=torch.bfloat16).head.weight.dtype == torch.bfloat16

    def test_without_transformers(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ModuleNotFoundError, match=r'pip install "acqcore\[train\]"'):
            acqcore.Student.load("some/model")

    def test_import_takes_nothing_heavy(self):
        code = (
            "import sys, acqcore, acqcore.cli\n"
            "heavy = {'transformers', 'triton', 'peft', 'datasets', 'pandas', 'rich', 'trl'} & set(sys.modules)\n"
            "sys.exit(', '.join(heavy) or 0)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("fails", [False, True], ids=["loads", "raises"])
def test_load_in_a_run_that_shards_its_models(student, zero3, monkeypatch, fails):
    """Loads whole models under ZeRO-3's global config and accelerate's FSDP switch; restores both, also on errors."""
    import transformers
    from transformers.integrations import deepspeed

    seen = []

    def load(*arguments, **options):
        seen.append((deepspeed.is_deepspeed_zero3_enabled(), os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")))
        if fails:
            raise OSError("no such model")
        return transformers.LlamaForCausalLM.from_pretrained(*arguments, **options)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda path: None)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    if fails:
        with pytest.raises(OSError, match="no such model"):
            acqcore.Student.load(student)
    else:
        assert acqcore.Student.load(student).head.weight.shape == (320, 32)
    assert seen == [(False, None)]
    assert deepspeed.is_deepspeed_zero3_enabled()
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"


class TestLoading:
    """Loading errors are one sentence and are raised before the hub is contacted."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dtype": "fp8"}, "dtype: unknown 'fp8', expected one of float32, bfloat16, float16, float64"),
            ({"dtype": torch.int8}, "dtype: unknown 'int8'"),
            ({"device": "gpu"}, "device: expected cpu, cuda or cuda:1, got 'gpu'"),
            ({"device": "cuda:31"}, "device: 'cuda:31' is not available"),
        ],
    )
    def test_options(self, student, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            acqcore.Student.load(student, **options)

    @pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "file"])
    def test_paths(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("no model")
        with pytest.raises(ValueError, match=rf"student: {re.escape(path)} holds no model \(no config\.json\)"):
            acqcore.Student.load(path)

    def test_without_a_tokenizer(self, student):
        """Tensors can be scored; text raises an error that names what is missing."""
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (student / name).unlink()
        loaded = acqcore.Student.load(student)
        assert loaded.tokenizer is None
        assert acqcore.score(loaded, {"input_ids": torch.tensor([[5, 6, 7]])}).valid.all()
        with pytest.raises(TypeError, match="tokenizer: text samples require one, got none"):
            acqcore.score(loaded, ["a fox"])
        (student / "tokenizer.json").write_text("{")
        with pytest.raises(ValueError, match=r"student: the tokenizer of .* does not load: "):
            acqcore.Student.load(student)
