"""Fixtures shared by the tests.

With TRITON_INTERPRET=1 (Triton reads it once per process) the backend ``triton`` runs on the CPU, and only tests that
involve it run: those with ``triton`` in their id, as in cases of ``implementation``, and those in ``tests/kernels``.
"""

from __future__ import annotations

import abc
import contextlib
import csv
import dataclasses
import functools
import importlib.util
import inspect
import json
import os
import runpy
import subprocess
import sys
import zlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pytest
import torch

import acqcore
from acqcore import _core
from acqcore.acquisitions import REGISTRY, RowNeed
from acqcore.backends import _BACKENDS, LogitRows
from acqcore.backends.base import Backend
from acqcore.backends.cuda import Cuda
from acqcore.backends.extension import matrix, pointer
from acqcore.backends.triton import INTERPRETED
from acqcore.cli import main
from acqcore.philox import keep_mask
from acqcore.students.samples import encode

# ``benchmarks`` is not in the installed package under test, and a peer (Opacus) installs a package of the same name.
_FOLDER = Path(__file__).parent.parent / "benchmarks"
_SPEC = importlib.util.spec_from_file_location(
    "benchmarks", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
)
sys.modules["benchmarks"] = importlib.util.module_from_spec(_SPEC)

if INTERPRETED:
    # Triton's interpreter searches its modules for builtins at each call of a helper, and builds a table of dtypes at
    # each operation; together they take a third of the time.
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def _builtins(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def _patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in _builtins(package):
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    _np_dtype, _np_dtypes = interpreter._get_np_dtype, {}

    def _get_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in _np_dtypes:
            _np_dtypes[name] = _np_dtype(dtype)
        return _np_dtypes[name]

    interpreter._patch_builtin, interpreter._get_np_dtype = _patch_builtin, _get_np_dtype


class EmulatedCuda(Cuda):
    """The cuda backend without a device: the same cuts, merges and arithmetic on the CPU."""

    name = "cuda emulated"
    devices = ("cpu",)
    multiprocessors = 132

    def unavailable(self) -> str | None:
        return None

    def _product(self, hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(hidden.float(), weight.float().T, out=out)

    def _fold(self, rows: LogitRows, vocab_start: int, accumulate: bool) -> None:
        targets = None if rows.targets is None else rows.targets.contiguous()
        args = _core.CudaLogitStatsArgs(
            matrix(rows.logits), pointer(targets), rows.temperature, vocab_start, accumulate, rows.state.data_ptr(),
            rows.index.data_ptr(),
        )  # fmt: skip
        _core.cuda_logit_stats_on_host(args, self.multiprocessors)


class OnDevice(Backend):
    """Runs a GPU backend on CPU tensors: inputs keep their strides on the device, and results are copied back."""

    devices = ("cpu",)

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.name, self.description, self.dtypes = backend.name, backend.description, backend.dtypes

    def longest_gram(self, depth: int, dtype: torch.dtype) -> int:
        return self.backend.longest_gram(depth, dtype)


#: Arguments of a backend's operations, and fields of dataclass arguments, that the operations write.
WRITTEN = {
    "state",
    "index",
    "products",
    "votes",
    "out",
    "values",
    "hashed",
    "squared",
    "sums",
    "signed",
    "squares",
    "keep",
}


def _on_device(name: str) -> Any:
    names = list(inspect.signature(getattr(Backend, name)).parameters)[1:]

    def call(self: OnDevice, *arguments: Any) -> None:
        moved = [_moved(value) for value in arguments]
        getattr(self.backend, name)(*moved)
        for argument, given, found in zip(names, arguments, moved, strict=False):
            _copy_back(argument, given, found)

    return call


for _name in (Backend.__abstractmethods__ - {"longest_gram"}) | {"delta_sums"}:
    setattr(OnDevice, _name, _on_device(_name))
abc.update_abstractmethods(OnDevice)


def _moved(value: Any) -> Any:
    """Moves a tensor, or the tensors of a dataclass, to the GPU; returns anything else unchanged."""
    if isinstance(value, torch.Tensor):
        return _to_device(value)
    if isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        return tuple(map(_moved, value))
    if not dataclasses.is_dataclass(value):
        return value
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    changed = {name: other for name, old in fields.items() if (other := _moved(old)) is not old}
    return dataclasses.replace(value, **changed)


def _copy_back(name: str, given: Any, found: Any) -> None:
    if isinstance(given, torch.Tensor) and name in WRITTEN:
        given.copy_(found)
    elif dataclasses.is_dataclass(given):
        for field in dataclasses.fields(given):
            _copy_back(field.name, getattr(given, field.name), getattr(found, field.name))


def _to_device(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` on the GPU with the same strides."""
    if tensor.numel() == 0:
        return tensor.cuda()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    storage = tensor.as_strided((span,), (1,)).cuda()
    return storage.as_strided(tensor.shape, tensor.stride())


def _implementations() -> list[str]:
    """Every available backend; the cpu backend once per instruction set of this processor."""
    names = [f"cpu/{isa}" for isa, missing in _core.isas() if not missing]
    return names + [row.name for row in acqcore.backends() if row.available and row.name != "cpu"]


#: The longest tests come first, so that none of them, started last, leaves the other cores idle.
LONGEST = (
    "test_executors.py",
    "test_sharding.py",
    "test_no_attack_passes",
    "test_costs.py::test_measured",
    "test_machine_code",
    "test_sandbox.py",
    "test_bodies_of_8_mib_are_answered",
    "test_a_killed_run_goes_on",
    "test_tells_ignorance_from_ambiguity",
    "test_train.py",
)


def _place(item: pytest.Item) -> int:
    """The position in ``LONGEST`` of the first part that is in the test's id."""
    return next((i for i, part in enumerate(LONGEST) if part in item.nodeid), len(LONGEST))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thin",
        action="store_true",
        help="of each test, cases that show every value of its parameters on each backend",
    )


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = items
    if INTERPRETED:
        kept = [item for item in kept if "triton" in item.nodeid or "tests/kernels/" in item.nodeid]
    if config.getoption("--thin"):
        seen: set[tuple[Any, ...]] = set()
        kept = [item for item in kept if _shows_more(item, seen)]
    rest = set(items) - set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in rest])
    items[:] = sorted(kept, key=_place)


def _shows_more(item: pytest.Item, seen: set[tuple[Any, ...]]) -> bool:
    """Whether the case has a parameter value that ``seen`` lacks for its test and implementation; adds its values."""
    found = getattr(item, "callspec", None)
    if found is None:
        return True
    test, implementation = item.nodeid.partition("[")[0], found.params.get("implementation")
    values = {name: value if isinstance(value, Hashable) else id(value) for name, value in found.params.items()}
    own = {(test, implementation, *value) for value in values.items()}
    more = not own <= seen
    seen |= own
    return more


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs ``implementation`` over the backends; tests of statistics also get the emulated cuda backend."""
    if "implementation" in metafunc.fixturenames:
        statistics = metafunc.module.__name__.endswith(("test_row_stats", "test_logit_stats"))
        names = _implementations() + ([EmulatedCuda.name] if statistics else [])
        metafunc.parametrize("implementation", names, indirect=True)


@pytest.fixture
def implementation(request, monkeypatch):
    """A backend's name, with its instruction set forced; a GPU backend moves the tests' tensors to its device."""
    name, _, isa = request.param.partition("/")
    if isa:
        monkeypatch.setenv("ACQCORE_ISA", isa)
    if name == EmulatedCuda.name:
        monkeypatch.setitem(_BACKENDS, name, EmulatedCuda())
    elif _BACKENDS[name].devices == ("cuda",):
        monkeypatch.setitem(_BACKENDS, name, OnDevice(_BACKENDS[name]))
    return name


@pytest.fixture
def set_threads():
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def forked():
    """``forked(code)``: what the code prints in a fork of a process that has only imported torch and acqcore."""
    server = (
        "import os, sys, torch, acqcore\n"
        "for line in sys.stdin:\n"
        "    child = os.fork()\n"
        "    if child == 0: exec(eval(line)); sys.stdout.flush(); os._exit(0)\n"
        "    print('ended', os.waitpid(child, 0)[1], flush=True)\n"
    )
    # Freed memory returns to the system at once, so that a peak counts only memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    with subprocess.Popen(
        [sys.executable, "-c", server], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:

        def run(code):
            process.stdin.write(repr(code) + "\n")
            process.stdin.flush()
            printed = ""
            while not (line := process.stdout.readline()).startswith("ended"):
                assert line, "the process ended"
                printed += line
            assert line == "ended 0\n", printed
            return printed

        yield run


@pytest.fixture
def extra_mib(forked):
    """``extra_mib(setup, call)``: MiB by which ``call`` raises the peak memory of a separate process."""
    if sys.platform != "linux":
        pytest.skip("reads the peak of resident memory from /proc")

    def run(setup, call):
        code = (
            "def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
            f"{setup}\n"
            "open('/proc/self/clear_refs', 'w').write('5')\n"  # resets the peak to what is resident now
            "before = peak()\n"
            f"{call}\n"
            "print((peak() - before) / 1024)\n"
        )
        return float(forked(code).splitlines()[-1])

    return run


SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "What is 2 + 3? The answer is 5.",
    "A patient has fever and a cough; which drug helps?",
    "def add(a, b): return a + b",
    "Ünïcode — naïve café, 日本語, 🙂!",
]

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of at most 320 tokens with a chat template; it adds no special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES * 5, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", bos_token="<|bos|>", eos_token="<|eos|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture
def with_template(tokenizer):
    """``with_template(template)``: the tokenizer with another chat template; ``adds`` puts a token around each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    def build(template=tokenizer.chat_template, adds=False):
        backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
        if adds:
            special = [(name, backend.token_to_id(name)) for name in ("<|bos|>", "<|eos|>")]
            backend.post_processor = TemplateProcessing(single="<|bos|> $A <|eos|>", special_tokens=special)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=template, bos_token="<|bos|>", eos_token="<|eos|>"
        )

    return build


@pytest.fixture
def encoded(tokenizer):
    """``encoded(samples)``: their rows for a student of 320 tokens and ``limit`` positions."""

    def run(samples, tokenizer=tokenizer, limit=64, **options):
        return encode(samples, tokenizer, vocab_size=320, limit=limit, **options)

    return run


@pytest.fixture(scope="session")
def tiny_model():
    """``tiny_model(kind, **config)``: a random language model, 320 tokens, 64 positions, in eval mode."""
    import transformers

    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # spreads the logits, so that caps and scales matter
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    own: dict[str, dict[str, Any]] = {
        "Llama": {"tie_word_embeddings": False},
        "Qwen2": {"tie_word_embeddings": True},
        "Qwen3": {},
        "Gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0, "sliding_window": 8},
        "Gemma3": {"sliding_window": 8, "final_logit_softcapping": 1.5},
        "GPT2": {key: sizes[key] for key in ("vocab_size", "initializer_range")} | gpt2,
        "Cohere": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 3.0},
        "Phi": {"partial_rotary_factor": 0.5},  # its head has a bias
        "JetMoe": {"kv_channels": 16, "num_local_experts": 4},  # creates a block's MLP before its attention
    }

    def build(kind, **config):
        suffix = "Text" if kind == "Gemma3" else ""
        settings = own[kind] if kind == "GPT2" else sizes | own[kind]
        if kind in ("Gemma2", "Gemma3"):
            settings = settings | {"num_hidden_layers": 7 if kind == "Gemma3" else 2}  # both kinds of layer
        torch.manual_seed(0)
        name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
        model = getattr(transformers, name)(getattr(transformers, f"{kind}{suffix}Config")(**(settings | config)))
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            torch.nn.init.normal_(bias)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def small_model():
    """``small_model(kind, **config)``: a random model of a type that transformers knows, 128 tokens, in eval mode."""
    return runpy.run_path(str(Path(__file__).parent / "conformance" / "models.py"))["build"]


@pytest.fixture
def exact():
    """``exact(model, samples, parameters, loss="mean")``: the gradient of each sample, ``[n, total]`` float64.

    One backward per sample, unpadded, through the model's own logits. Samples are tensors padded on the right.
    """

    def run(model, samples, parameters, loss="mean"):
        found = [p.requires_grad for p in parameters]
        rows = []
        for ids, mask, labels in zip(
            samples["input_ids"], samples["attention_mask"], samples.get("labels", samples["input_ids"]), strict=True
        ):
            length = int(mask.sum())
            for p in parameters:
                p.requires_grad_(True)
            logits = model(input_ids=ids[None, :length]).logits[0, :-1]
            value = torch.nn.functional.cross_entropy(logits, labels[1:length], reduction=loss)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
            pieces = [
                p.new_zeros(p.numel()) if g is None else g.flatten() for g, p in zip(gradients, parameters, strict=True)
            ]
            rows.append(torch.cat(pieces).double())
        for p, flag in zip(parameters, found, strict=True):
            p.requires_grad_(flag)
        return torch.stack(rows)

    return run


@pytest.fixture
def dropped_logits():
    """``dropped_logits(model, ids, sites, p, draw)``: one sample's logits ``[T, V]`` float64 under one draw of dropout.

    Hooks drop the output of every (site, module) of ``sites`` with the mask of its definition.
    """

    def run(model, ids, sites, p, draw):
        sample = torch.full((len(ids),), zlib.crc32(ids.numpy().tobytes()))

        def hook(site):
            def drop(module, arguments, output):
                value = output[0] if isinstance(output, tuple) else output  # [1, T, D]
                keep = keep_mask(sample, torch.arange(len(ids)), value.shape[-1], p, 0, draw, site)
                value = value * keep / (1 - p)
                return (value, *output[1:]) if isinstance(output, tuple) else value

            return drop

        with contextlib.ExitStack() as hooks, torch.no_grad():
            for site, module in sites:
                hooks.enter_context(module.register_forward_hook(hook(site)))
            return model(input_ids=ids[None]).logits[0].double()

    return run


@pytest.fixture(scope="session")
def informed_students():
    """Trained students that know some answers, cannot know others and never saw the rest.

    Three, since rounding differs between processors, and training carries that into the AUROC of one: 0.94 to 1.00.
    """
    from benchmarks import toy_student

    return [toy_student.train(seed) for seed in range(3)]


@pytest.fixture
def with_logits():
    """``with_logits(trunk, weight)``: a model whose logits are the trunk's hidden states times the weight."""

    class WithLogits(torch.nn.Module):
        def __init__(self, trunk, weight):
            super().__init__()
            self.trunk, self.weight = trunk, weight

        def forward(self, input_ids):
            return type("Output", (), {"logits": self.trunk(input_ids) @ self.weight.T})

    return WithLogits


@pytest.fixture
def brute_force():
    """``brute_force(model, ids, scored)``: per-token references of each acquisition, from the model's logits.

    One sample, full logits, no padding; ``ids [T]``, ``scored [T]`` bool. Name -> ``[scored tokens]``.
    """

    def run(model, ids, scored):
        seen: list[torch.Tensor] = []
        head = model.get_output_embeddings()
        with torch.no_grad(), head.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            logits = model(input_ids=ids[None]).logits[0].float()
        before = scored.nonzero()[:, 0] - 1
        z, hidden, targets = logits[before], seen[0][0, before].float(), ids[scored]
        of_rows = [entry for entry in REGISTRY.values() if entry.needs == RowNeed()]
        return {entry.name: entry.reference(z, targets, hidden) for entry in of_rows}

    return run


@pytest.fixture
def student(tmp_path, tiny_model, tokenizer):
    """The folder of a small saved model."""
    folder = tmp_path / "student"
    tiny_model("Llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def zero3():
    """Transformers' global setting of a run under ZeRO-3."""
    from transformers.integrations import deepspeed

    trainer_config = type("TrainerConfig", (), {"config": {}, "is_zero3": lambda self: True})()
    deepspeed.set_hf_deepspeed_config(trainer_config)  # which keeps only a weak reference
    yield
    deepspeed.unset_hf_deepspeed_config()


@pytest.fixture
def read():
    """``read(path)``: the rows of a .jsonl, a .csv, a .parquet or a folder of parquet files."""

    def run(path):
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text().split("\n") if line]
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                return list(csv.DictReader(file))
        return pytest.importorskip("pyarrow.parquet").read_table(path, partitioning=None).to_pylist()

    return run


@pytest.fixture
def refused(capsys):
    """``refused(words)``: the only line that the command prints for wrong usage, without ``acqcore: error: ``."""

    def run(words):
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as stop:  # argparse ends the process itself
            code = int(str(stop.code))
        [line] = capsys.readouterr().err.strip().splitlines()
        assert code == 2
        assert line.startswith("acqcore: error: ")
        return line.removeprefix("acqcore: error: ")

    return run


@pytest.fixture
def command(student, tmp_path):
    """``command(rows, **options)``: a command line that scores ``rows`` (dicts, or raw lines) into out.jsonl. An option
    of None is omitted."""

    def build(rows, **options):
        data = tmp_path / "data.jsonl"
        data.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        settings = {"student": student, "data": data, "out": tmp_path / "out.jsonl", "backend": "eager", **options}
        flags = [(f"--{key.replace('_', '-')}", str(value)) for key, value in settings.items() if value is not None]
        return ["score", *(word for flag in flags for word in flag)]

    return build
