"""The command line: output, exit codes and one-sentence errors."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest
import transformers

from acqsynth import label, preflight, train
from acqsynth.cli import main
from acqsynth.steps import STAGES, Store


def test_help_config_lists_every_key(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", "--help-config"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for key in ("domain", "generator.options", "evaluation.others.<name>.source", "reward.signals", "rounds"):
        assert f"\n{key}  " in f"\n{printed}"
    assert "\n    split of a hub data set, train or test in the arithmetic domains; a local file has none\n" in printed
    assert "smollm2-math" in printed


@pytest.mark.parametrize("stage", ["run", "train", "report"])
def test_a_dry_run_tells_and_does_nothing(fakes, recipe, stage, capsys):
    assert main([stage, str(recipe), "--dry-run", "student.seeds=[0]"]) == 0
    printed = capsys.readouterr().out
    assert "00-seeds/rows" in printed
    assert "01-train/grpo" in printed
    assert "runs: never ran" in printed
    assert ("06-report" in printed) == (stage != "train")
    assert not (recipe.parent / "out").exists()
    assert not fakes


@pytest.mark.parametrize(("stage", "steps"), [("seeds", 1), ("train", 0)])
def test_a_dry_run_names_the_folder_as_it_is_written(fakes, recipe, stage, steps, capsys):
    folder = recipe.parent / "[lr=1] [/x] :smile:"
    assert main([stage, str(recipe), "--dry-run", "generator.method=none", f"output='{folder}'"]) == 0
    assert capsys.readouterr().out.endswith(f"{steps} of {steps} steps would run in {folder}.\n")


def test_run_tells_of_steps_and_ends_with_the_verdict(fakes, recipe, capsys):
    assert main(["run", str(recipe)]) == 0
    printed = capsys.readouterr().out
    report = recipe.parent / "out/06-report/report"
    assert "[01-train/grpo] starts: never ran" in printed
    assert "over the base student in distribution" in printed
    assert printed.splitlines()[-1] == f"Report: {report / 'report.html'}"
    for said in json.loads((report / "metrics.json").read_text())["verdict"]:
        assert said["text"] in printed
    assert main(["run", str(recipe)]) == 0
    assert "0 of " in capsys.readouterr().out
    assert main(["run", str(recipe), "labelling.k=5", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "03-label/grpo" in printed
    assert "runs: labelling.k changed" in printed
    assert "03-label/grpo, which it reads, has to run" in printed
    assert "is done; nothing it reads has changed" in printed


def test_a_stage_alone_brings_what_it_needs(fakes, recipe):
    assert main(["label", str(recipe), "baselines=[no_rl]"]) == 0
    folders = {path.name for path in (recipe.parent / "out").iterdir() if path.is_dir()}
    assert folders == {"00-seeds", "01-train", "02-generate", "03-label"}
    assert fakes["fit"] == 0
    assert main(["train", str(recipe), "baselines=[no_rl]"]) == 0
    assert fakes["train"] == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "nowhere"], "acqsynth: error: nowhere: no such file or recipe; the package has"),
        (["run", "math", "seeed=1"], "acqsynth: error: math: seeed: unknown key, did you mean seed?"),
        (["run", "math", "rounds=x"], "acqsynth: error: math: rounds: expected an integer, got 'x'"),
    ],
)
def test_a_wrong_recipe_exits_with_2(arguments, sentence, capsys):
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(sentence)
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("--vers", "the following arguments are required: COMMAND"),
        ("walk math", "argument COMMAND: invalid choice: 'walk'"),
        ("run", "the following arguments are required: recipe\n"),
        ("run math --dry-runn", "unrecognized argument: --dry-runn"),
        ("run math --dry-run seed", "unrecognized argument: seed"),
        ("run math --dry", "unrecognized argument: --dry"),
        ("push run --to there --license mit --pub", "unrecognized argument: --pub"),
        ("push run --to there --lic mit", "the following arguments are required: --license"),
        ("serve --student smollm2 --tok SECRET", "unrecognized argument: --tok"),
        ("serve --stud smollm2", "the following arguments are required: --student"),
    ],
)
def test_wrong_usage_exits_with_2(line, said, capsys):
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"acqsynth: error: {said}")
    assert told.count("\n") == 1


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.seeds.source=gone.jsonl", "data.seeds: gone.jsonl: no such file"),
        ("student.model=./gone", "student.model: ./gone holds no model (no config.json)"),
        ("student.model=recipe.yaml", "student.model: recipe.yaml holds no model (no config.json)"),
        ("student.model=world:skewd", "student.model: unknown 'world:skewd', expected world:base, world:"),
        ("generator.model=/gone", "generator.model: /gone holds no model (no config.json)"),
        ("engine.options.device=cuda:31", "engine.options.device: 'cuda:31' is not available"),
        ("engine={name: vllm}", 'engine.name: vllm is not installed: run pip install "acqcore[vllm]"'),
        ("generator.options={use_vllm: true}", "generator.options.use_vllm: vllm is not installed: run pip install"),
        ("output=recipe.yaml", "output: cannot write to recipe.yaml"),
    ],
)
def test_what_is_missing_here_is_said_before_a_run(more, override, sentence, fakes, recipe, capsys, monkeypatch):
    monkeypatch.chdir(recipe.parent)
    assert main(["run", str(recipe), override, *more]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"acqsynth: error: {sentence}")
    assert told.count("\n") == 1
    assert not fakes


def test_a_stage_that_fails_exits_with_1(fakes, recipe, capsys, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("no rows\nto read")

    monkeypatch.setattr("acqsynth.stages.rows.find_domain", fail)
    assert main(["run", str(recipe)]) == 1
    told = capsys.readouterr().err
    assert told == "acqsynth: error: 00-seeds/rows: ValueError: no rows to read\n"


def test_a_folder_in_use_exits_with_1(fakes, recipe, capsys):
    with Store(recipe.parent / "out").locked():
        assert main(["run", str(recipe)]) == 1
    assert "another run is using" in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_an_output_whose_name_is_too_long_is_one_sentence(more, fakes, recipe, capsys, monkeypatch):
    monkeypatch.chdir(recipe.parent)
    assert main(["run", str(recipe), f"output={'a' * 300}", *more]) == 1
    told = capsys.readouterr().err
    assert told.startswith("acqsynth: error: output: ")
    assert told.strip().count("\n") == 0
    assert "File name too long" in told


@pytest.mark.parametrize("place", [(label, "label"), (preflight, "on_this_machine")])
def test_an_interrupt_says_how_to_go_on(fakes, recipe, monkeypatch, capsys, place):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*place, interrupted)
        assert main(["run", str(recipe), "baselines=[no_rl]"]) == 130
    told = capsys.readouterr().err
    assert told == "acqsynth: interrupted; run the same command to resume, finished steps are kept\n"
    assert main(["run", str(recipe), "baselines=[no_rl]"]) == 0
    assert fakes["train"] == 1


def test_what_libraries_print_goes_to_the_log(fakes, recipe, monkeypatch, capsys):
    inner = train.grpo

    def chatty(*arguments, **options):
        print("{'loss': 1.0}")
        transformers.utils.logging.get_logger("transformers.generation").warning("flags are not valid")
        inner(*arguments, **options)

    monkeypatch.setattr(train, "grpo", chatty)
    transformers.logging.set_verbosity_warning()  # its default, which the demo lowers for the rest of the process
    assert main(["train", str(recipe)]) == 0
    printed = capsys.readouterr()
    assert "loss" not in printed.out
    assert printed.err == ""
    log = (recipe.parent / "out/run.log").read_text()
    assert "{'loss': 1.0}" in log
    assert "flags are not valid" in log


def test_help_lists_the_stages(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for stage in (*STAGES, "run", "serve"):
        assert f"\n    {stage} " in printed
    assert "``" not in printed


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"acqsynth {metadata.version('acqcore')}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from acqsynth.cli import main\n"
        "try: main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(' '.join({'torch', 'transformers', 'matplotlib', 'yaml', 'rich'} & {*sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == ""
    assert "--dry-run" in result.stdout


@pytest.mark.parametrize(
    ("line", "missing", "message"),
    [
        (
            ["run", "arithmetic"],
            "rich",
            "'acqsynth run' needs rich, which is not installed: run pip install \"acqcore[train]\"",
        ),
        (["run", "--help-config"], "yaml", "--help-config needs yaml, which is not installed"),
        (
            ["serve", "--student", "s"],
            "uvicorn",
            'serving needs uvicorn, which is not installed: run pip install "acqcore[serve]"',
        ),
    ],
)
def test_a_missing_extra_is_one_sentence(line, missing, message):
    code = f"import sys; sys.modules[{missing!r}] = None; from acqsynth.cli import main; sys.exit(main({line!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"acqsynth: error: {message}")
    assert len(result.stderr.splitlines()) == 1
