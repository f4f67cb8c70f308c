"""Planning: sizes against real models, extrapolation from measurements that follow a known law, the command."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import acqcore
from acqcore.cli import main
from acqcore.costs import command, measure as measuring
from acqcore.costs.estimate import COMPUTED, EXTENDED, GIVEN, MEASURED, Estimate, from_rates, from_runs
from acqcore.costs.measure import Run
from acqcore.costs.shape import Shape, shape_of, with_blocks
from acqcore.costs.work import (
    CHUNKED_SCRATCH,
    DRAWS_SCRATCH,
    HEAD_SCRATCH,
    Passes,
    Work,
    activation_bytes,
    batch_seconds,
    passes,
)

MIB = 1 << 20
SHAPE = Shape(
    name="Model", dtype="float32", stored_dtype="float32", blocks=30, kinds=1, hidden=64, vocabulary=1000, widest=160,
    heads=4, attention="sdpa", max_tokens=512, parameters=1_000_000, block_parameters=900_000, weight_bytes=4_000_000,
    stored_bytes=4_000_000, head_bytes=256_000, tied=False,
)  # fmt: skip


def work_of(acquisitions: str = "entropy", shape: Shape = SHAPE, **changes: Any) -> Work:
    settings: dict[str, Any] = {"rows": 100, "tokens": 64, "scored": 32, "batch_tokens": 512, "arguments": None}
    return Work.checked(shape, acquisitions=acquisitions.split(","), **(settings | changes))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2", "Phi", "Gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_model(kind, dtype, tiny_model):
    model = tiny_model(kind)
    shape = shape_of(model.config, dtype)
    model.to(dtype)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.weight_bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert shape.stored_bytes == 4 * shape.parameters
    assert (shape.vocabulary, shape.hidden) == (320, 32)
    assert shape.head_bytes == 320 * 32 * dtype.itemsize
    assert shape.tied == (kind in ("Qwen2", "GPT2", "Gemma3"))
    assert shape.blocks == (7 if kind == "Gemma3" else 2)
    assert shape.kinds == (2 if kind == "Gemma3" else 1)
    assert shape.widest == (128 if kind == "GPT2" else 48)
    assert shape.max_tokens == 64


@pytest.mark.parametrize(("kind", "heads"), [("mamba", 0), ("modernbert-decoder", 4)])
def test_sizes_of_other_structures(kind, heads, small_model):
    model = small_model(kind)
    shape = shape_of(model.config, torch.float32)
    assert (shape.blocks, shape.heads) == (2, heads)
    assert shape.parameters == sum(p.numel() for p in model.parameters())


def test_a_tied_head_is_counted_once(tiny_model):
    tied, untied = (
        shape_of(tiny_model("Llama", tie_word_embeddings=tied).config, torch.float32) for tied in (True, False)
    )
    assert untied.weight_bytes - tied.weight_bytes == untied.head_bytes == 320 * 32 * 4


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Gemma3"])
def test_fewer_blocks(kind, tiny_model):
    config = tiny_model(kind).config
    whole, one = shape_of(config, torch.float32), shape_of(with_blocks(config, 1), torch.float32)
    assert one.blocks == one.kinds == 1
    assert whole.parameters - one.parameters == (whole.blocks - 1) * one.block_parameters
    assert config.num_hidden_layers == whole.blocks  # the given configuration is unchanged


def test_seventy_billion_parameters_are_counted_without_weights():
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    shape = shape_of(config, torch.bfloat16)
    assert shape.parameters == 70_553_706_496
    assert shape.weight_bytes == 2 * shape.parameters
    assert shape.head_bytes == 2 * 128256 * 8192


@pytest.mark.parametrize(
    ("acquisitions", "arguments", "expected"),
    [
        ("entropy,margin,loss", None, Passes(1, 1, 0)),
        ("grad_norm", None, Passes(1, 1 + 32 / 128, 0)),
        ("entropy,grad_norm", {"grad_norm": {"parameters": 3}}, Passes(1 + 2 * 3 / 30, 2, 3)),
        ("grad_norm", {"grad_norm": {"parameters": "all"}}, Passes(3, 2 + 0.25, 30)),
        ("influence", None, Passes(3, 2, 30)),
        ("epig", None, Passes(1 + 3 * 2, 2 + 2, 30)),
        ("influence,gradient_diversity", {"gradient_diversity": {"parameters": "all"}}, Passes(3, 2, 30)),
        (
            "grad_norm,influence,badge",
            {"grad_norm": {"parameters": "all"}, "badge": {"parameters": 3}},
            Passes(1 + 1 + 2 + 2 * 3 / 30, 2 + 0.25 + 2, 30),
        ),
        ("badge", None, Passes(1, 1 + 1 + 0.25, 0)),
        ("gradient_diversity,archive_novelty", None, Passes(1, 1, 0)),
        ("mutual_information", {"mutual_information": {"layers": 0, "draws": 4}}, Passes(1, 4, 0)),
        ("mutual_information", {"mutual_information": {"form": "block", "draws": 8}}, Passes(1, 2, 0)),
        (
            "mutual_information,expected_entropy",
            {"mutual_information": {"draws": 8}},
            Passes(8, 8, 0),
        ),  # equal arguments share the draws
        ("entropy,mutual_information", {"mutual_information": {"draws": 8}}, Passes(1 + 8, 1 + 8, 0)),
        ("mutual_information", None, Passes(1 + 4, 4 + 2, 30)),
        ("mutual_information", {"mutual_information": {"layers": 3, "draws": 8}}, Passes(27 / 30 + 8 * 3 / 30, 8, 0)),
    ],
)
def test_passes(acquisitions, arguments, expected):
    found = passes(SHAPE, work_of(acquisitions, arguments=arguments))
    assert found.trunk == pytest.approx(expected.trunk)
    assert (found.head, found.kept_blocks) == (expected.head, expected.kept_blocks)


@pytest.mark.parametrize(
    ("acquisitions", "arguments", "products"),
    [
        ("entropy", None, 1),
        ("gradient_diversity", None, 1),
        ("entropy,grad_norm", {"grad_norm": {"parameters": 3}}, 1 + 2),
        ("influence", None, 1 + 2),
        ("mutual_information", {"mutual_information": {"layers": 0, "draws": 4}}, 2 * 4),
        ("mutual_information", {"mutual_information": {"form": "block", "draws": 8}}, 2),
        ("mutual_information", None, 4 + 3),
        ("mutual_information,grad_norm", None, 1 + 0.25 + 4 + 3),
    ],
)
def test_a_gpu_takes_more_products(acquisitions, arguments, products):
    """It multiplies again for dL/dh, for random cotangents and for the mean of draws."""
    assert passes(SHAPE, work_of(acquisitions, arguments=arguments), on_cpu=False).head == products


def runs(
    law: Callable[[int, int], tuple[float, int]], rows: int, fewer: int, depths: tuple[int, ...], full: int = 0
) -> list[Run]:
    """Measurements for which ``law(blocks, rows)`` gives the seconds and the bytes beyond the weights."""
    return [
        Run(
            blocks=blocks,
            rows=rows,
            seconds=(law(blocks, rows)[0],) * 3,
            peak=1000 * blocks + law(blocks, rows)[1],
            fewer_rows=fewer,
            fewer_peak=1000 * blocks + law(blocks, fewer)[1],
            full_peak=1000 * blocks + law(blocks, full)[1] if full else None,
            weight_bytes=1000 * blocks,
            libraries=5000,
            start_seconds=2.0,
            load_seconds=1.0 + 0.5 * blocks,
        )
        for blocks in depths
    ]


def value(figures: Any, name: str) -> Any:
    return next(figure for figure in figures if figure.name == name)


@pytest.mark.parametrize("full", [0, 8])
def test_the_extrapolation_is_linear_in_blocks_and_rows(full):
    """Seconds are always bilinear; bytes are with a backward pass."""
    work = work_of("grad_norm", arguments={"grad_norm": {"parameters": "all"}})
    assert work.batch_rows == 8

    def law(blocks, rows):
        return rows * (0.25 + 0.5 * blocks), 7000 + rows * (40 + 16 * blocks)

    estimate = from_runs(SHAPE, work, runs(law, rows=4, fewer=2, depths=(1, 4), full=full), devices=1)
    assert estimate.scoring_seconds == pytest.approx(100 * (0.25 + 0.5 * 30))
    assert value(estimate.time, "a batch, in the blocks").value == pytest.approx(8 * 0.5 * 30)
    assert value(estimate.time, "a batch, in embedding and head").value == pytest.approx(8 * 0.25)
    assert value(estimate.time, "loading").value == pytest.approx(1.0 + 0.5 * 30)
    assert estimate.peak_bytes == pytest.approx(SHAPE.weight_bytes + 7000 + 8 * (40 + 16 * 30))
    assert value(estimate.memory, "scoring a batch").value == pytest.approx(2000 + 8 * (40 + 16 * 30))
    assert value(estimate.memory, "peak while scoring").source == EXTENDED
    assert estimate.layouts == ()


def test_without_a_backward_pass_memory_does_not_grow_with_blocks():
    estimate = from_runs(
        SHAPE, work_of(), runs(lambda blocks, rows: (1.0, 7000 + 10 * rows + blocks), 4, 2, (1, 4)), devices=1
    )
    assert estimate.peak_bytes == SHAPE.weight_bytes + 7000 + 10 * 8 + 4


def test_a_full_batch_of_the_smaller_model_is_believed():
    low, high = runs(lambda blocks, rows: (1.0, 7000 + 10 * rows + blocks), 4, 2, (1, 4))
    estimate = from_runs(SHAPE, work_of(), [replace(low, full_peak=1000 + 9000), high], devices=1)
    assert estimate.peak_bytes == SHAPE.weight_bytes + 9000 + 3
    assert value(estimate.memory, "scoring a batch").note.endswith("4 of 8 rows of a batch, a full batch with 1")


def test_what_is_measured_whole_is_called_measured():
    shape, work = replace(SHAPE, blocks=3), work_of(shape=replace(SHAPE, blocks=3))
    estimate = from_runs(shape, work, runs(lambda blocks, rows: (rows * blocks, 7000), 8, 4, (1, 3)), devices=1)
    assert value(estimate.time, "all rows").source == MEASURED
    assert value(estimate.time, "all rows").value == pytest.approx(300)


def test_a_single_block():
    shape, work = replace(SHAPE, blocks=1), work_of(shape=replace(SHAPE, blocks=1))
    estimate = from_runs(shape, work, runs(lambda blocks, rows: (rows * 0.5, 7000), 1, 1, (1,)), devices=1)
    assert estimate.scoring_seconds == pytest.approx(50)
    assert estimate.peak_bytes == SHAPE.weight_bytes + 7000


def test_a_slow_turn_is_outvoted_and_a_falling_line_is_flat():
    low, high = runs(lambda blocks, rows: (rows * (1 + blocks), 7000), 1, 1, (1, 4))
    estimate = from_runs(SHAPE, work_of(), [low, replace(high, seconds=(5.0, 50.0, 5.0))], devices=1)
    assert estimate.scoring_seconds == pytest.approx(100 * 31)
    estimate = from_runs(SHAPE, work_of(), [low, replace(high, seconds=(1.5,) * 3)], devices=1)
    assert estimate.scoring_seconds == pytest.approx(100 * 2)


def layouts(shape: Shape) -> Estimate:
    return from_runs(
        shape, work_of(rows=96), runs(lambda blocks, rows: (rows * (0.25 + blocks), 7000), 8, 4, (1, 4)), devices=4
    )


def test_several_devices():
    estimate = layouts(SHAPE)
    seconds, peak = 96 * 30.25, SHAPE.weight_bytes + 7000
    processes, services, head, tensor = estimate.layouts
    assert processes.seconds == pytest.approx(seconds / 4 + 2 + 1.0 + 0.5 * 30)  # 12 batches, 3 each; start, loading
    assert services.seconds == pytest.approx(seconds / 4)
    assert processes.bytes_per_device == services.bytes_per_device == peak
    assert head.seconds == pytest.approx(96 * (30 + 0.25 / 4))
    assert head.bytes_per_device == peak - 0.75 * SHAPE.head_bytes
    assert tensor.seconds == pytest.approx(seconds / 4)
    assert tensor.bytes_per_device == SHAPE.weight_bytes / 4 + 7000


def test_a_tied_head_is_not_divided_where_the_trunk_is_whole():
    assert layouts(replace(SHAPE, tied=True)).layouts[2].bytes_per_device == SHAPE.weight_bytes + 7000


def test_batches_that_devices_do_not_divide():
    estimate = from_rates(SHAPE, work_of(rows=40), 1e12, 1e12, devices=2, on_cpu=True)  # five batches: 3 and 2
    assert estimate.layouts[1].seconds == pytest.approx(estimate.scoring_seconds * 3 / 5)


@pytest.mark.parametrize(
    ("stored", "dtype", "weights", "expected"),
    [
        ("float32", "float32", 4_000_000, 4_000_000),
        ("float32", "bfloat16", 2_000_000, 4_000_000 + 2_000_000),
        ("bfloat16", "bfloat16", 2_000_000, 2_000_000 + 4 * 1000 * 64),
    ],
)
def test_peak_while_loading(stored, dtype, weights, expected):
    shape = replace(SHAPE, stored_dtype=stored, dtype=dtype, weight_bytes=weights)
    shape = replace(shape, stored_bytes=4_000_000 if stored == "float32" else 2_000_000)
    estimate = from_runs(shape, work_of(), runs(lambda blocks, rows: (1.0, 7000), 1, 1, (1, 4)), devices=1)
    assert value(estimate.memory, "peak while loading").value == 5000 + expected


def test_activations_by_formula():
    tokens, scored = 512, 256
    block, rows = tokens * (2 * 64 + 3 * 160) * 4, 2 * scored * 64 * 4
    assert activation_bytes(SHAPE, work_of()) == block + rows + HEAD_SCRATCH
    assert activation_bytes(SHAPE, work_of(), on_cpu=False) == block + rows + CHUNKED_SCRATCH
    half = replace(SHAPE, dtype="bfloat16")
    assert activation_bytes(half, work_of()) == (block + rows) // 2 + HEAD_SCRATCH
    eager = replace(SHAPE, attention="eager")
    assert activation_bytes(eager, work_of()) == block + tokens * 64 * 4 * 8 + rows + HEAD_SCRATCH
    kept = work_of("grad_norm", arguments={"grad_norm": {"parameters": 3}})
    three, spread = 3 * tokens * (8 * 64 + 4 * 160) * 4, tokens * 64 * 4
    assert activation_bytes(SHAPE, kept) == block + three + rows + rows // 2 + spread + HEAD_SCRATCH
    probed = work_of("mutual_information", arguments={"mutual_information": {"layers": 3, "probes": 5}})
    assert activation_bytes(SHAPE, probed) == block + three + rows + 6 * rows // 2 + spread + HEAD_SCRATCH
    given = {"mutual_information": {"draws": 8}}
    drawn = work_of(
        "mutual_information", arguments=given, batch_tokens=128, tokens=64
    )  # two rows per batch, but one row if drawn eight times
    assert activation_bytes(SHAPE, drawn) == 4 * block // 4 + rows // 4 + DRAWS_SCRATCH


@pytest.mark.parametrize(
    ("acquisition", "options"),
    [("gradient_diversity", {}), ("gradient_diversity", {"dim": 16384}), ("grad_norm", {"parameters": 1})],
)
def test_activations_by_formula_are_those_of_torch(acquisition, options, tiny_model):
    """Tensors that torch allocates in a batch; the formula adds up a forward's and a head's, which do not coincide."""
    model = tiny_model("Llama", hidden_size=128, intermediate_size=256, head_dim=64)
    student = acqcore.Student.from_model(model)
    ids = torch.arange(1024).view(16, 64) % 320

    def score():
        acqcore.score(student, {"input_ids": ids}, acquisition, acquisition_args={acquisition: options})

    score()
    with torch.profiler.profile(profile_memory=True) as profile:
        score()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    peak = max(itertools.accumulate(changes))
    shape = shape_of(model.config, torch.float32)
    arguments = {acquisition: options}
    formula = activation_bytes(
        shape, work_of(acquisition, shape, batch_tokens=8192, rows=16, scored=63, arguments=arguments)
    )
    assert 0 <= formula - HEAD_SCRATCH - peak < 8 * MIB


def test_seconds_from_rates():
    trunk = 2 * 512 * (900_000 + 64 * 64 * 30)
    head = 2 * 256 * 64 * 1000
    assert batch_seconds(SHAPE, work_of(), 1e9, 1e12) == pytest.approx((trunk / 1e9, head / 1e9))
    bytes_alone = batch_seconds(SHAPE, work_of(), 1e15, 1e6)
    assert bytes_alone == pytest.approx((900_000 * 4 / 1e6, 256_000 / 1e6))
    estimate = from_rates(SHAPE, work_of(), 1e9, 1e12, devices=1, on_cpu=False)
    assert estimate.scoring_seconds == pytest.approx((trunk + head) / 1e9 * 100 / 8)
    assert {figure.source for figure in estimate.time} == {GIVEN}
    assert {figure.source for figure in estimate.memory} == {COMPUTED}
    more = from_rates(SHAPE, work_of(rows=200), 1e9, 1e12, devices=1, on_cpu=False)
    assert more.scoring_seconds == pytest.approx(2 * estimate.scoring_seconds)
    assert more.peak_bytes == estimate.peak_bytes


@pytest.fixture
def student(tmp_path, tiny_model):
    tiny_model("Llama", num_hidden_layers=6).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.fixture
def arguments(student):
    """``arguments(**options)``: the command line; None omits an option."""

    def build(**options):
        settings = {"config": student / "config.json", "rows": 100, "tokens": 32, "batch_tokens": 128, **options}
        flags = [(f"--{key.replace('_', '-')}", str(v)) for key, v in settings.items() if v is not None]
        return ["plan", *(word for flag in flags for word in flag)]

    return build


def test_measured_with_weights(arguments, student, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "BUDGET_S", 0.01)
    given = {"grad_norm": {"parameters": 2}}
    options: dict[str, Any] = {"acquisitions": "entropy,grad_norm", "acquisition_args": json.dumps(given), "devices": 2}
    monkeypatch.setenv("HOME", str(student.parent))
    assert main([*arguments(config=None, student="~/student", threads=1, **options), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    model = plan["model"]
    assert (model["name"], model["blocks"], model["dtype"]) == ("LlamaForCausalLM", 6, "float32")
    assert plan["work"]["acquisitions"] == ["entropy", "grad_norm"]
    memory = {figure["name"]: figure for figure in plan["memory"]}
    assert memory["weights"]["value"] == model["weight_bytes"] == 4 * model["parameters"]
    assert 50 * MIB < memory["interpreter and libraries"]["value"] < plan["peak_bytes"] < 4096 * MIB
    assert memory["peak while scoring"]["source"] == EXTENDED
    assert memory["scoring a batch"]["note"].startswith("2 and 5 blocks")  # no fewer than the gradients need
    time = {figure["name"]: figure for figure in plan["time"]}
    assert 0 < time["loading"]["value"] < 60
    assert time["all rows"]["value"] == plan["scoring_seconds"] > 0
    assert len(plan["layouts"]) == 4


def test_measured_from_a_configuration_alone(arguments, student, capsys, monkeypatch):
    monkeypatch.setattr(measuring, "BUDGET_S", 0.01)
    monkeypatch.setattr(command, "BUSY", -1.0)
    config = student / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 1}))  # a single measurement
    assert main(arguments(acquisitions="influence,mutual_information", dtype="bfloat16")) == 0
    out = " ".join(capsys.readouterr().out.split())
    for shown in ("weights", "computed", "peak while scoring", MEASURED, "not known", "slowed down the measurement"):
        assert shown in out


def test_a_device_that_is_not_here(arguments, capsys):
    options = arguments(device="h100", flops=4e14, bandwidth=3e12, devices=8, rows="10_000")
    assert main(options) == 0
    assert "8 devices like this one, computed" in capsys.readouterr().out
    assert main([*options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"] == "h100"
    assert {figure["source"] for figure in plan["time"]} == {GIVEN}


def test_blocks_of_several_kinds_and_long_rows_are_noted(tiny_model, tmp_path, capsys):
    tiny_model("Gemma3").config.save_pretrained(tmp_path)
    flags = ["--rows", "10", "--tokens", "32", "--batch-tokens", "16", "--flops", "1e12", "--bandwidth", "1e11"]
    assert main(["plan", "--config", str(tmp_path / "config.json"), *flags]) == 0
    out = capsys.readouterr().out
    assert "The 7 blocks are of 2 kinds" in out
    assert "longer than --batch-tokens 16" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows: expected an int >= 1, got 0"),
        ({"tokens": 1}, "tokens: expected at least 2"),
        ({"tokens": 65}, "tokens: the student takes at most 64 tokens, got 65"),
        ({"scored": 32}, "scored: expected at most 31 of a row of 32 tokens, got 32"),
        ({"batch_tokens": 0}, "--batch-tokens: expected an int >= 1, got 0"),
        ({"devices": 0}, "devices: expected an int >= 1, got 0"),
        ({"threads": 0}, "threads: expected an int >= 1, got 0"),
        ({"acquisitions": "entropie"}, "acquisitions: unknown 'entropie'"),
        ({"acquisition_args": '{"grad_norm": {}}'}, "'grad_norm' is not among the acquisitions asked for"),
        (
            {"acquisitions": "grad_norm", "acquisition_args": '{"grad_norm": {"parameters": "trainable"}}'},
            "'trainable' depends on adapters",
        ),
        (
            {"acquisitions": "grad_norm", "acquisition_args": '{"grad_norm": {"parameters": 7}}'},
            "parameters: expected at most 6",
        ),
        (
            {"acquisitions": "mutual_information", "acquisition_args": '{"mutual_information": {"layers": 7}}'},
            "layers: expected at most 6",
        ),
        (
            {
                "acquisitions": "mutual_information",
                "acquisition_args": '{"mutual_information": {"members": ["a", "b"]}}',
            },
            "members cannot be planned",
        ),
        ({"acquisition_args": "{"}, "argument --acquisition-args: expected JSON, got"),
        ({"acquisitions": "influence", "acquisition_args": '{"influence": 3}'}, "--acquisition-args['influence']: "),
        ({"flops": 1e12}, "--flops and --bandwidth: expected both or neither"),
        ({"flops": -1, "bandwidth": 1}, "flops: expected a number > 0, got -1"),
        ({"device": "h100"}, "device: 'h100' is not on this machine and cannot be measured"),
        ({"config": "missing.json"}, "config: no file or folder missing.json"),
        ({"config": None, "student": "./missing"}, "--student: no file or folder ./missing"),
        ({"config": None}, "one of the arguments --student --config is required"),
        ({"student": "x"}, "not allowed with argument"),
    ],
)
def test_wrong_usage_is_one_sentence(options, message, arguments, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(arguments(**options))


def test_without_transformers(arguments, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert 'needs transformers: run pip install "acqcore[train]"' in refused(arguments())


def test_a_model_that_does_not_fit_is_not_measured(arguments, capsys, monkeypatch):
    monkeypatch.delattr("os.getloadavg")  # as on Windows
    monkeypatch.setattr(measuring, "free_bytes", lambda device: 10 * MIB)
    assert main(arguments()) == 2
    error = capsys.readouterr().err
    assert "plan: measuring models of 1 and 2 blocks with a batch needs 0.05 GiB, but 0.01 GiB are available" in error


def test_a_failing_measurement_is_told(tmp_path, tiny_model):
    config = tiny_model("Llama").config
    shape = shape_of(config, torch.float32)
    with pytest.raises(RuntimeError, match=r"measuring failed: (OSError|ValueError): .*nowhere"):
        measuring.measure(str(tmp_path / "nowhere"), config, shape, work_of(shape=shape), "cpu", None)


def test_units():
    assert [command.size(v) for v in (3 * MIB, 2560 * MIB)] == ["3 MiB", "2.50 GiB"]
    shown = [command.seconds(v) for v in (0.0, 0.0123, 0.0994, 0.0996, 0.5, 4.25, 42.0, 600.0, 9000.0)]
    assert shown == ["0.0 s", "12 ms", "99 ms", "100 ms", "0.50 s", "4.2 s", "42.0 s", "10.0 min", "2.5 h"]
