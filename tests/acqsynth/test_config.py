"""Recipes: parsing, overrides and error messages."""

from __future__ import annotations

import pytest
import yaml

from acqsynth import config as recipes
from acqsynth.config import Config, ConfigError

LEAST = """
domain: math
data:
  seeds: {source: seeds.jsonl}
  evaluation: {source: test.jsonl}
generator: {model: a/generator}
student: {model: a/student}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(LEAST)
    return path


def test_the_least_recipe_takes_every_default(recipe):
    config = recipes.load(recipe)
    assert config.generator.model == "a/generator"
    assert config.generator.method == "grpo"
    assert config.student.rows == [1000]
    assert config.reward.signals is None
    assert config.baselines == ["no_rl", "random_real", "filtered_real", "error_driven"]
    assert config.data.real is None


def test_overrides_are_yaml_and_the_last_counts(recipe):
    config = recipes.load(
        recipe,
        [
            "generator.options.learning_rate=1e-6",
            "student.rows=[100, 1000]",
            "reward.signals={entropy: , influence: {n: 2}}",
            "seed=1",
            "seed=2",
            "evaluation.others.med.source=x.jsonl",
            "data.seeds.limit=null",
            "student.replay=0",
        ],
    )
    assert config.generator.options == {"learning_rate": 1e-6}
    assert config.student.rows == [100, 1000]
    assert config.reward.signals == {"entropy": {}, "influence": {"n": 2}}
    assert config.seed == 2
    assert config.evaluation.others["med"].source == "x.jsonl"
    assert config.data.seeds.limit is None
    assert (config.student.replay, type(config.student.replay)) == (0.0, float)


NUMBERS = {"1e-6": 1e-6, "2E+3": 2e3, "-1e5": -1e5, "1.5e-3": 1.5e-3, "3e4": 3e4, "0x10": 16, "1_000": 1000, "-0": 0}
NUMBERS |= {"+7": 7, ".5": 0.5, "5.": 5.0, "007.5": 7.5, ".5e1": 5.0, "-1.5E-1": -0.15}
WORDS = {"True": True, "~": None, "Null": None}
#: YAML 1.1 reads some of these as a boolean, 90, 8 or a date.
TEXTS = ["e-6", "1e", "v1e-6", "1e-6x", "1_", "no", "on", "Yes", "y", "1:30", "010", "0o17", "2026-01-01", "=", "1.2.3"]


@pytest.mark.parametrize(("text", "value"), {**NUMBERS, **WORDS, **{text: text for text in TEXTS}}.items())
def test_words_and_numbers_of_yaml(recipe, text, value):
    read = recipes.load(recipe, [f"student.options.x={text}"]).student.options["x"]
    assert (read, type(read)) == (value, type(value))


def test_words_may_be_names(recipe):
    config = recipes.load(recipe, ["output=2026-01-01", "student.others={no: on}", "data.seeds.columns={question: y}"])
    assert (config.output, config.student.others) == ("2026-01-01", {"no": "on"})
    assert config.data.seeds.columns == {"question": "y"}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("generator.modle=x", "generator.modle: unknown key, did you mean generator.model?"),
        ("learning=1", "learning: unknown key, expected one of domain, data, generator, student, engine"),
        ("student.threshold=0.5", "student.threshold: unknown key, did you mean labelling.threshold?"),
        ("generator.prompts=many", "generator.prompts: expected an integer, got 'many'"),
        ("generator.prompts=1.5", "generator.prompts: expected an integer, got 1.5"),
        ("generator.prompts=true", "generator.prompts: expected an integer, got true"),
        ("student.rows=100", "student.rows: expected a list, got 100"),
        ("student.rows=[100, x]", "student.rows[1]: expected an integer, got 'x'"),
        ("generator.method=grpoo", "or 'none', got 'grpoo', did you mean grpo?"),
        ("generator=x", "generator: expected a section, got 'x'"),
        ("generator.model=null", "generator.model: expected text, got nothing"),
        ("reward.signals=[entropy]", "reward.signals: expected a mapping, got a list"),
        ("reward.signals.entropy=3", "reward.signals.entropy: expected a mapping, got 3"),
        ("reward.signals={}", "reward.signals: expected at least one entry"),
        ("reward.paper_compat=true", "reward: paper_compat needs exactly one signal"),
        (
            "reward={signals: {entropy: {}}, paper_compat: true, fusion: rank}",
            "reward: paper_compat has no weights, gates",
        ),
        ("reward={signals: {entropy: {}}, weights: {margin: 1}}", "reward: weights.margin: no such signal"),
        ("baselines=[none]", "baselines[0]: expected 'no_rl', 'random_real'"),
        ("baselines=[no_rl, no_rl]", "baselines: expected distinct entries, got no_rl, no_rl"),
        ("rounds=0", "rounds: expected at least 1, got 0"),
        ("student.replay=1.0", "student.replay: expected less than 1, got 1.0"),
        ("labelling.threshold=0", "labelling.threshold: expected more than 0, got 0"),
        ("evaluation.level=1", "evaluation.level: expected less than 1, got 1"),
        ("student.rows=[]", "student.rows: expected at least one entry"),
        ("student.seeds=[1, 1]", "student.seeds: expected distinct entries, got 1, 1"),
        ("data.seeds.limit=0", "data.seeds.limit: expected at least 1, got 0"),
        ("data.evaluation.skip=-1", "data.evaluation.skip: expected at least 0, got -1"),
        ("labelling.method=teacher", "labelling: expected a teacher with method teacher"),
        ("reward.labelling={k: 0}", "reward.labelling.k: expected at least 1, got 0"),
        ("reward.labelling={method: teacher}", "reward.labelling: expected a teacher with method teacher"),
        ("seed=-1", "seed: expected at least 0, got -1"),
        ("student.seeds=[-1]", "student.seeds[0]: expected at least 0, got -1"),
        ("seed=99999999999999999999", "seed: expected at most 1"),
        ("student.seeds=[0, 4294967296]", "student.seeds[1]: expected at most 1"),
        ('output="a\\0b"', "output: expected the path of a folder, got 'a\\x00b'"),
        ("output=~nobody-of-this-name/x", "output: expected the path of a folder"),
        ("reward.refresh_from=~nobody-of-this-name/x", "reward.refresh_from: expected the path of a folder"),
        ("generator.sampling.temperature=-1", "generator.sampling.temperature: expected at least 0, got -1"),
        ("generator.sampling.top_p=5", "generator.sampling.top_p: expected at most 1, got 5"),
        ("labelling.temperature=.nan", "labelling.temperature: expected a finite number, got nan"),
        ("rounds=2000", "rounds: expected at most student.rows = 1000, got 2000"),
        ("data.seeds.domain=code", "data.seeds.domain: unknown key"),
        ("evaluation.others.more={source: x, domin: y}", "did you mean evaluation.others.more.domain?"),
        ("evaluation.others.more={}", "evaluation.others.more.source: missing; hub id"),
        ("evaluation.others={v1.5: {}}", "evaluation.others.v1.5.source: missing; hub id"),
        ("evaluation.others={v1.5: {source: x, domin: y}}", "did you mean evaluation.others.v1.5.domain?"),
        ("generator={model: x, options.lora: 1}", "options.lora: unknown key, did you mean generator.options?"),
        ("student={model: x, a.b: 1}", "student.a.b: unknown key, expected one of model, others, rows"),
        ("evaluation.others.a/b.source=x", "evaluation.others.a/b: expected a name of letters"),
        ("output=''", "output: expected a name or path, got ''"),
        ("generator.prompts=010", "generator.prompts: expected an integer, got '010'"),
        ("generator.turns=yes", "generator.turns: expected true or false, got 'yes'"),
        ("generator.options={a: [1, .inf]}", "generator.options: expected text, finite numbers, true or false, lists"),
        ("reward.signals={entropy: {x: .nan}}", "reward.signals.entropy: expected text, finite numbers, true or"),
        ("data.seeds.source=''", "data.seeds.source: expected a name or path, got ''"),
        ("prompts", "'prompts': expected dotted.key=value"),
        ("a..b=1", "'a..b=1': expected dotted.key=value"),
        ("student.rows=[1", "student.rows: not YAML"),
        ("generator.model.name=x", "generator.model.name: generator.model is 'a/generator', which has no keys"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_key(recipe, override, sentence):
    with pytest.raises(ConfigError) as caught:
        recipes.load(recipe, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_merge_keys_and_anchors_are_read(recipe):
    recipe.write_text(
        LEAST.replace("seeds: {source: seeds.jsonl}", "seeds: &rows {source: seeds.jsonl, limit: 3}").replace(
            "evaluation: {source: test.jsonl}", "evaluation: {<<: *rows, source: test.jsonl}"
        )
    )
    data = recipes.load(recipe).data
    assert (data.evaluation.source, data.evaluation.limit) == ("test.jsonl", 3)
    assert (data.seeds.source, data.seeds.limit) == ("seeds.jsonl", 3)


def test_an_override_leaves_other_uses_of_an_anchor_unchanged(recipe):
    recipe.write_text(
        LEAST.replace("seeds: {source: seeds.jsonl}", "seeds: &rows {source: seeds.jsonl}\n  real: *rows")
        .replace("generator: {", "generator: {options: &lora {lora: {r: 2}}, ")
        .replace("student: {", "student: {options: {<<: *lora, seed: 1}, ")
    )
    config = recipes.load(recipe, ["data.seeds.limit=5", "data.seeds.skip=1", "student.options.lora.r=3"])
    assert (config.data.seeds.limit, config.data.seeds.skip) == (5, 1)
    assert (config.data.real.source, config.data.real.limit, config.data.real.skip) == ("seeds.jsonl", None, 0)
    assert (config.generator.options, config.student.options) == ({"lora": {"r": 2}}, {"lora": {"r": 3}, "seed": 1})


def test_home_is_expanded(recipe, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = recipes.load(recipe, ["output=~/runs/x", "reward.refresh_from=~/student"])
    assert (config.output, config.reward.refresh_from) == ("/home/ada/runs/x", "/home/ada/student")


def test_rounds_need_a_generator_that_learns(recipe):
    with pytest.raises(ConfigError, match=r"rounds: expected 1, as generator\.method none trains no generator"):
        recipes.load(recipe, ["rounds=2", "generator.method=none"])


@pytest.mark.parametrize("key", ["domain", "data", "generator", "student"])
def test_a_missing_key_is_named_with_its_meaning(recipe, key):
    values = yaml.safe_load(LEAST)
    del values[key]
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=f"{recipe}: {key}: missing; "):
        recipes.load(recipe)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("domain: math\ndomain: code\n", "key 'domain' is repeated"),
        ("a: [1", "not YAML: while parsing a flow sequence in line 1, column 4: "),
        ("a: " + "[" * 3000 + "]" * 3000 + "\n", "nested too deeply"),
        ("{a: " * 3000 + "1" + "}" * 3000 + "\n", "nested too deeply"),
        ("- a\n", "expected sections such as 'domain:' and 'data:', got a list"),
        ("", "got nothing"),
        ("domain: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("seed: !!int abc\n", "not YAML: invalid literal for int() with base 10: 'abc'"),
        ("seed: !!bool abc\n", "not YAML: 'abc'"),
        ("seed: !!timestamp abc\n", "not YAML: "),
        ("1: x\n", "key 1: expected text, such as '1' in quotes in line 1, column 1: "),
    ],
)
def test_text_that_is_no_recipe(recipe, text, sentence):
    recipe.write_text(text)
    with pytest.raises(ConfigError) as caught:
        recipes.load(recipe)
    assert str(caught.value).startswith(str(recipe))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere.yaml", "a" * 300], ids=["unknown", "too long"])
def test_an_unknown_recipe_names_those_there_are(name):
    with pytest.raises(ConfigError, match=rf"{name}: no such file or recipe; the package has"):
        recipes.load(name)


@pytest.mark.parametrize(
    "name", ["arithmetic", "arithmetic-skewed", "code", "intents", "intents-gpu", "math", "medical", "smollm2-math"]
)
def test_the_recipes_of_the_package_are_found_by_bare_name(name):
    assert name in recipes.recipes()
    assert recipes.load(name) == recipes.load(f"{name}.yaml")


def test_smollm2_math_takes_at_most_twenty_steps():
    assert recipes.load("smollm2-math").generator.options["max_steps"] <= 20


def test_every_field_is_documented_once():
    documented = list(recipes.documented())
    keys = [key for key, *_ in documented]
    assert len(set(keys)) == len(keys)
    assert all(doc and not doc.endswith(".") for *_, doc in documented)
    assert set(Config.model_fields) <= set(keys)
    by_key = {key: rest for key, *rest in documented}
    assert by_key["generator.options"][:2] == ["options by name", "{}"]
    assert by_key["student.rows"][:2] == ["a list, each an integer", "[1000]"]
    assert by_key["data.seeds.source"][1] == "required"
    assert by_key["evaluation.others.<name>.domain"][0] == "text or null"
    assert by_key["reward.paper_compat"][:2] == ["true or false", "false"]
