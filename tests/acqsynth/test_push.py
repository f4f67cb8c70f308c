"""Publishing a finished run to a folder (rows, student and cards) and to a mocked hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest.mock import create_autospec

import fake_run
import pyarrow.parquet
import pytest
import yaml
from huggingface_hub import DatasetCard, HfApi, ModelCard

from acqsynth import config as recipes, pipeline, push
from acqsynth.cli import main
from acqsynth.steps import Store


def options(folder):
    return f"options: {{run_name: {folder / 'start'}, hub_token: hf_hidden}}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder of a finished run whose recipe has a path and a token among its options."""
    folder = tmp_path_factory.mktemp("published")
    recipe = fake_run.RECIPE.replace("questions: 90}", f"questions: 90, {options(folder)}}}")
    (folder / "recipe.yaml").write_text(f"{recipe}output: {folder / 'out'}\n")
    with pytest.MonkeyPatch.context() as patch:
        fake_run.install(patch.setattr)
        plan = pipeline.plan(recipes.load(folder / "recipe.yaml"))
        store = Store(Path(plan.config.output))
        for step in plan.steps:
            store.run(step)
    return folder / "out"


def test_rows_student_and_cards_in_a_folder(fakes, run, tmp_path, capsys):
    to = tmp_path / "published"
    assert main(["push", str(run), "--to", str(to), "--license", "cc-by-4.0"]) == 0
    assert capsys.readouterr().out.split() == [str(to / "dataset"), str(to / "model")]
    rows = pyarrow.parquet.read_table(to / "dataset/data/train.parquet")
    assert rows.equals(pyarrow.parquet.read_table(run / "03-label/grpo/samples.parquet"))
    page = (to / "dataset/report.html").read_text()
    assert "All settings of this run" in page
    fitted = run / "04-fit/grpo-student-70-s0/model"
    assert (to / "model/config.json").read_text() == (fitted / "config.json").read_text()
    assert not (to / "model/training_args.bin").exists()

    card = DatasetCard.load(to / "dataset/README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.configs[0]["data_files"] == [{"split": "train", "path": "data/train.parquet"}]
    assert f"{rows.num_rows} rows in the domain `sums`" in card.text
    recipe = yaml.safe_load(card.text.split("```yaml\n")[1].split("```")[0])
    assert recipe["generator"]["options"] == {"run_name": "start"}
    assert recipe["data"]["real"] == {**recipe["data"]["real"], "source": "sums:200", "limit": 200}

    model = ModelCard.load(to / "model/README.md")
    assert model.data.license == "cc-by-4.0"
    assert "`student` fine-tuned on 70 rows of the arm `grpo`, seed 0." in model.text
    assert "| in_distribution | 40.7 % | " in model.text
    assert "2 students with seeds 0, 1, on rows written with generator seed 0, with 95 % intervals" in model.text
    for text in (card.text, model.text):
        assert "| rejected: does not parse | 6 |" in text
        assert "| in training, rejected by gate `parses` | 2 |" in text
        assert "over the base student in distribution: 40.7 %" in text
        assert "torch" in text
    for text in (card.text, model.text, page):
        assert str(run.parent) not in text
        assert "hf_hidden" not in text


def test_the_hub_gets_two_repositories_of_the_name(fakes, run, monkeypatch, capsys):
    api = create_autospec(HfApi, instance=True)  # calls must match the client's signatures
    api.create_repo.side_effect = lambda name, **options: f"https://hub/{options['repo_type']}/{name}"
    files = {}

    def upload(*, repo_type, folder_path, **options):
        files[repo_type] = sorted(str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*.*"))
        assert options["repo_id"] == "me/sums"

    api.upload_folder.side_effect = upload
    monkeypatch.setattr(push, "HfApi", lambda: api)
    assert main(["push", str(run), "--to", "hub:me/sums", "--license", "mit"]) == 0
    assert capsys.readouterr().out.split() == ["https://hub/dataset/me/sums", "https://hub/model/me/sums"]
    assert files == {
        "dataset": ["README.md", "data/train.parquet", "report.html"],
        "model": ["README.md", "config.json"],
    }
    assert [call.kwargs["private"] for call in api.create_repo.call_args_list] == [True, True]


@pytest.mark.parametrize(("refuted", "rows"), [(0, "| rows with a label | 8 |"), (2, "| labels refuted | 2 |")])
def test_labels_of_which_none_could_be_checked(refuted, rows):
    labelled = {"asked": 9, "labelled": 8, "truth_known": 0, "right": 0, "refuted": refuted, "dropped": {}}
    assert push._counts({"written": None, "labelled": labelled}, None).splitlines()[-1] == rows


@pytest.mark.parametrize("only", ["dataset", "model"])
def test_one_of_the_two(fakes, run, tmp_path, only):
    assert main(["push", str(run), "--to", str(tmp_path), "--license", "mit", "--only", only]) == 0
    assert [path.name for path in tmp_path.iterdir()] == [only]


@pytest.mark.parametrize(
    ("folder", "to", "sentence"),
    [
        ("nowhere", "there", "nowhere: not a finished run, 06-report/report/metrics.json is missing"),
        ("", "hub:me", "--to: expected hub:owner/name or a folder, got hub:me"),
        ("", "taken", "--to: taken/model is not empty"),
        ("", "~nobody-of-this-name/x", "--to: ~nobody-of-this-name/x: Could not determine home directory."),
        (
            "cut",
            "there",
            "cut/06-report/report/metrics.json: not readable: Expecting value: line 1 column 1 (char 0)",
        ),
    ],
)
def test_mistakes_in_one_sentence(fakes, run, tmp_path, monkeypatch, capsys, folder, to, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken/model").mkdir(parents=True)
    (tmp_path / "taken/model/old.txt").touch()
    (tmp_path / "cut/06-report/report").mkdir(parents=True)
    (tmp_path / "cut/06-report/report/metrics.json").touch()
    assert main(["push", folder or str(run), "--to", to, "--license", "mit"]) == 2
    assert capsys.readouterr().err == f"acqsynth: error: {sentence}\n"
    assert [path.name for path in (tmp_path / "taken").rglob("*.*")] == ["old.txt"]  # nothing was written
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize(
    ("overrides", "stage", "reason"),
    [
        (["seed=5"], "label", "03-label/grpo, which it reads, has to run"),
        (["student.options.learning_rate=1.0"], "fit", "04-fit/grpo-student-70-s0, which it reads, has to run"),
        (["evaluation.level=0.9"], "report", None),
    ],
)
def test_artefacts_of_another_recipe_are_refused(fakes, run, tmp_path, capsys, overrides, stage, reason):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    recipe = fake_run.RECIPE.replace("questions: 90}", f"questions: 90, {options(run.parent)}}}")
    (tmp_path / "recipe.yaml").write_text(f"{recipe}output: {folder}\n")
    plan, store = pipeline.plan(recipes.load(tmp_path / "recipe.yaml", overrides)), Store(folder)
    for step in plan.of(stage):
        store.run(step)
    arguments = ["push", str(folder), "--to", str(tmp_path / "to"), "--license", "mit"]
    assert main(arguments) == (0 if reason is None else 2)
    if reason is not None:
        said = f"acqsynth: error: {folder}: the report is out of date ({reason}): run its recipe again\n"
        assert capsys.readouterr().err == said
        assert not (tmp_path / "to").exists()


def test_a_folder_in_use_is_not_published(fakes, run, tmp_path, capsys):
    with Store(run).locked():
        assert main(["push", str(run), "--to", str(tmp_path / "to"), "--license", "mit"]) == 2
    assert capsys.readouterr().err == f"acqsynth: error: output: another run is using {run}\n"
