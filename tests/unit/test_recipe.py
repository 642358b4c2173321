"""Recipes: loading, overriding, resolving paths, and errors that name the key."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from greenprune import recipe, schema, storage
from greenprune.errors import RecipeError, RunError
from greenprune.recipe import BUILT_IN, Recipe


def written(folder: Path, text: str, name: str = "mine.toml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_an_empty_file_is_the_default_job_under_the_files_name(tmp_path: Path) -> None:
    loaded = recipe.load(written(tmp_path, ""))

    assert loaded == dataclasses.replace(Recipe(), name="mine")


def test_values_reach_their_sections_and_the_rest_keeps_its_defaults(tmp_path: Path) -> None:
    text = """
    name = "ours"
    seed = 7
    [data]
    size = [24, 32]
    mean = [0.5, 1]
    [train]
    epochs = 3
    [prune]
    mild.macs = 0.7
    """
    loaded = recipe.load(written(tmp_path, text))

    assert (loaded.name, loaded.seed) == ("ours", 7)
    assert loaded.data.size == (24, 32)
    assert loaded.data.mean == (0.5, 1.0)
    assert loaded.train == dataclasses.replace(Recipe().train, epochs=3)
    assert loaded.prune.mild.macs == 0.7
    assert loaded.prune.aggressive == Recipe().prune.aggressive


@pytest.mark.parametrize("name", sorted(recipe.built_in_recipes()))
def test_built_in_recipes_load_by_name_and_describe_themselves(name: str) -> None:
    assert recipe.load(name).name == name
    description = recipe.built_in_recipes()[name]
    assert description
    assert not description.startswith("#")


def test_every_shipped_recipe_is_listed_and_none_means_lenet5() -> None:
    assert set(recipe.built_in_recipes()) == {path.stem for path in BUILT_IN.glob("*.toml")}
    assert recipe.load(None) == recipe.load("lenet5-digits")


def test_overrides_are_toml_or_else_plain_text(tmp_path: Path) -> None:
    path = written(tmp_path, "[train]\nepochs = 3\nbatch_size = 16\n")

    loaded = recipe.load(
        path,
        [
            "train.epochs=5",
            "model.weights=some/resnet56.th",
            "data.held_out_from=test",
            "prune.method='random'",
            "data.size=[8, 9]",
            "model.arguments.num_classes=4",
            "bench.meter=a=b",
            "train.epochs=6",
        ],
    )

    assert loaded.train.epochs == 6, "the last one counts"
    assert loaded.train.batch_size == 16, "the rest of a section stays"
    assert loaded.model.weights == str(tmp_path / "some/resnet56.th")
    assert loaded.prune.method == "random"
    assert loaded.data.size == (8, 9)
    assert loaded.model.arguments == {"num_classes": 4}
    assert loaded.bench.meter == "a=b"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.epochs", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("seed.deep=3", "key 'seed'"),
        ("name.deep=3", "'name' is a value, not a section"),
        ("train.epoch=3", "unknown key 'train.epoch' (did you mean 'epochs'?)"),
        ("trian.epochs=3", "unknown key 'trian' (did you mean 'train'?)"),
        ("prune.mild.mac=0.5", "unknown key 'prune.mild.mac' (did you mean 'macs'?)"),
        ("train.epochs=many", "key 'train.epochs'"),
        ("train.epochs=2.5", "key 'train.epochs'"),
        ("train.epochs=-1", "key 'train.epochs'"),
        ("train.epochs=true", "key 'train.epochs'"),
        ("train.batch_size=0", "key 'train.batch_size'"),
        ("train.momentum=1.0", "key 'train.momentum'"),
        ("train.learning_rate=0", "key 'train.learning_rate'"),
        ("train.learning_rate=nan", "key 'train.learning_rate'"),
        ("train.learning_rate=inf", "train.learning_rate"),
        ("account.pue=inf", "account.pue"),
        ("account.pue=0.9", "key 'account.pue'"),
        ("bench.tdp_watts=0", "key 'bench.tdp_watts'"),
        ("bench.tdp_watts=nan", "key 'bench.tdp_watts'"),
        ("bench.tdp_watts=inf", "key 'bench.tdp_watts'"),
        ("data.channels=2", "key 'data.channels'"),
        ("data.size=[32]", "key 'data.size'"),
        ("data.std=[0.0]", "key 'data.std[0]'"),
        ("prune.method=lottery", "key 'prune.method'"),
        ("prune.mild.macs=1.5", "key 'prune.mild.macs'"),
        ("certify.delta=0", "key 'certify.delta'"),
        ("name=12", "key 'name'"),
        ("name=''", "name ''"),
        ("name='..'", "name '..'"),
        ("name='a/b'", "name 'a/b'"),
    ],
)
def test_errors_name_the_key(tmp_path: Path, override: str, named: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe.load(written(tmp_path, ""), [override])

    assert named in str(caught.value)


def test_errors_in_a_file_name_the_file_and_the_key(tmp_path: Path) -> None:
    path = written(tmp_path, "[finetune.mild]\nepochs = 'two'\n")

    with pytest.raises(RecipeError) as caught:
        recipe.load(path)

    assert str(path) in str(caught.value)
    assert "'finetune.mild.epochs'" in str(caught.value)


@pytest.mark.parametrize("aggressive", [0.4, 0.5])
def test_the_aggressive_network_must_be_the_smaller_one(tmp_path: Path, aggressive: float) -> None:
    path = written(tmp_path, f"[prune]\nmild.macs = 0.4\naggressive.macs = {aggressive}\n")

    with pytest.raises(RecipeError, match=r"prune\.aggressive\.macs .* below prune\.mild\.macs"):
        recipe.load(path)


def test_the_aggressive_network_may_differ_by_its_parameters_alone(tmp_path: Path) -> None:
    text = "[prune]\nmild.macs = 0.4\naggressive.macs = 0.4\naggressive.params = 0.2\n"

    assert recipe.load(written(tmp_path, text)).prune.aggressive.params == 0.2


def test_the_operating_loss_must_be_a_row_of_the_dial(tmp_path: Path) -> None:
    path = written(tmp_path, "")

    with pytest.raises(RecipeError, match=r"certify\.operating_loss = 0\.07 must be one of"):
        recipe.load(path, ["certify.operating_loss=0.07", "certify.max_accuracy_loss=[0.01]"])
    rows = ["certify.operating_loss=0.07", "certify.max_accuracy_loss=[0.01, 0.07]"]
    assert recipe.load(path, rows).certify.operating_loss == 0.07


def test_weights_from_elsewhere_need_a_word_on_what_they_have_seen(tmp_path: Path) -> None:
    path = written(tmp_path, "model.weights = 'net.th'\n")

    with pytest.raises(RecipeError, match=r"data\.held_out_from must be said too"):
        recipe.load(path)
    assert recipe.load(path, ["data.held_out_from=train"]).data.held_out_from == "train"


def test_a_recipe_made_in_python_is_held_to_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = Recipe(data=recipe.DataSettings(path="images", size=(8, 9)))

    assert recipe.checked(made).data.path == str(tmp_path / "images")
    assert recipe.checked(made).data.size == (8, 9)
    with pytest.raises(RecipeError, match="key 'seed'"):
        recipe.checked(dataclasses.replace(made, seed=-1))
    with pytest.raises(RecipeError, match="name 'a/b'"):
        recipe.checked(dataclasses.replace(made, name="a/b"))


def test_a_missing_recipe_names_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="lenet5-digits") as caught:
        recipe.load(tmp_path / "none.toml")

    assert "none.toml" in str(caught.value)


@pytest.mark.parametrize("content", [b"train = [", b"name = '\xff'"])
def test_what_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)

    with pytest.raises(RecipeError, match=r"broken\.toml: not valid TOML"):
        recipe.load(path)


def test_paths_are_relative_to_the_recipes_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = """
    [model]
    factory = "code/net.py:build"
    weights = "../net.th"
    [data]
    source = "images.py:load"
    held_out_from = "train"
    path = "/elsewhere/images"
    [task]
    loss = "sub/loss.py:mine"
    metric = "sub/metric.py:mine"
    """
    written(tmp_path / "job", text)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    by_relative_name = recipe.load(Path("job/mine.toml"))
    monkeypatch.chdir(tmp_path / "other")
    loaded = recipe.load(tmp_path / "job" / "mine.toml")

    assert loaded == by_relative_name, "where the command is typed does not matter"
    assert loaded.model.factory == f"{tmp_path}/job/code/net.py:build"
    assert loaded.model.weights == f"{tmp_path}/net.th"
    assert loaded.data.source == f"{tmp_path}/job/images.py:load"
    assert loaded.data.path == "/elsewhere/images"
    assert loaded.task.loss == f"{tmp_path}/job/sub/loss.py:mine"
    assert loaded.task.metric == f"{tmp_path}/job/sub/metric.py:mine"


def test_names_of_modules_are_left_alone(tmp_path: Path) -> None:
    names = ["model.factory=a.b:c", "data.source=a.b:d", "task.loss=a.b:e", "task.metric=a.b:f"]

    loaded = recipe.load(written(tmp_path, ""), names)

    assert (loaded.model.factory, loaded.data.source) == ("a.b:c", "a.b:d")
    assert (loaded.task.loss, loaded.task.metric) == ("a.b:e", "a.b:f")


def test_a_built_in_recipes_paths_are_relative_to_where_the_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    loaded = recipe.load(
        "lenet5-digits",
        ["model.weights=lenet.th", "data.path=~/images", "data.held_out_from=test"],
    )

    assert loaded.model.weights == str(tmp_path / "lenet.th")
    assert loaded.data.path == str(Path("~/images").expanduser())


def test_read_back_gives_the_recipe_of_a_run(tmp_path: Path) -> None:
    loaded = recipe.load(
        None,
        ["data.size=[8, 9]", "data.mean=[0.5]", "model.arguments.hidden=[4, 5]", "name='ours'"],
    )
    path = tmp_path / "run.json"
    storage.write_json(path, {"greenprune": "0", "recipe": schema.encode(loaded)})

    assert recipe.read_back(path) == loaded


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"recipe": {"nam": "x"}}', '{"recipe": {"seed": "x"}}', '{"recipe": 1}'],
)
def test_a_damaged_description_of_a_run_is_a_run_error(tmp_path: Path, content: str) -> None:
    path = written(tmp_path, content, "run.json")

    with pytest.raises(RunError, match=r"run\.json"):
        recipe.read_back(path)


def test_a_missing_description_of_a_run_is_a_run_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"run\.json"):
        recipe.read_back(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune.blocks=true"], "prune.blocks is for budgets, and there is none"),
        (["prune.steps=3"], "prune.steps is for budgets"),
        (['prune.cost_table="t.json"'], "prune.cost_table is for budgets"),
        (
            ['prune.mild.budget=["latency x2"]'],
            r"prune\.mild\.budget: budget 'latency x2'.*above 1",
        ),
        (['prune.mild.budget=["macs x0.5"]', "prune.mild.rates={conv1=0.5}"], "leave one out"),
        (
            ['prune.mild.budget=["macs x0.3"]', 'prune.aggressive.budget=["macs x0.9"]'],
            "the aggressive network is the smaller of the pair",
        ),
        (['prune.method="gates"', 'prune.mild.budget=["macs x0.3"]'], "leave rates, budget and"),
    ],
)
def test_budgets_that_cannot_be_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe.load(None, overrides)


def test_a_cost_table_is_found_from_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(
        '[prune]\ncost_table = "table.json"\nmild.budget = ["latency x0.5"]\n'
    )
    assert recipe.load(tmp_path / "own.toml").prune.cost_table == str(tmp_path / "table.json")
