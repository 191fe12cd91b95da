"""Laws of recipes: what is resolved reads back equal, and nothing a user writes is ignored.

Every error is one line that names where it was written and what would be right.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config.families import FAMILIES, tiny
from shoal.config.model import GQAConfig, LinearScaling, ModelConfig, RopeConfig, YarnScaling
from shoal.config.run import (
    DataConfig,
    OptimConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    from_table,
    load_recipe,
    to_table,
    to_toml,
)

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))

RECIPE = """
seed = 3
[model]
family = "deepseek-v3"
tiny = true
[model.moe]
n_routed_experts = 32
[data]
train = ["a.txt", "b.txt"]
seq_len = 64
[train]
steps = 50
[train.optim]
lr = 1e-3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def reload(config: RunConfig, folder: Path) -> RunConfig:
    path = folder / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return load_recipe(path)


def test_a_recipe_is_its_family_with_the_written_fields_changed(recipe: Path) -> None:
    twin = tiny("deepseek-v3")
    assert twin.moe is not None
    assert load_recipe(recipe) == RunConfig(
        model=replace(twin, moe=replace(twin.moe, n_routed_experts=32)),
        data=DataConfig(train=("a.txt", "b.txt"), seq_len=64),
        train=TrainConfig(steps=50, optim=OptimConfig(lr=1e-3)),
        seed=3,
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("small", [False, True])
def test_what_is_resolved_reads_back_equal(family: str, small: bool, tmp_path: Path) -> None:
    model = tiny(family) if small else FAMILIES[family].config
    config = RunConfig(model, TrainConfig(steps=7), DataConfig(seq_len=16))
    assert reload(config, tmp_path) == config
    assert from_table(to_table(config), "table") == config


def test_sources_are_named_weighed_and_set_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.replace('train = ["a.txt", "b.txt"]', "fim_rate = 0.1") + SOURCES)
    config = load_recipe(path, ['data.sources.zh.files=["c.txt"]', "data.sources.code.weight=2"])
    assert config.data.sources == {
        "en": SourceConfig(("a.txt",), 0.5),
        "zh": SourceConfig(("c.txt",), 0.25),
        "code": SourceConfig((), 2.0),
    }
    assert reload(config, tmp_path) == config
    for change, message in [
        ("data.sources.en.weight=0", "weight is 0"),
        ("data.sources.en.weigh=1", "the nearest is 'weight'"),
        ('data.train=["x"]', "train and sources are both given"),
        ("data.fim_rate=2", "fim_rate is 2"),
        ("data.sources=3", "data.sources is 3; it must be a table"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_recipe(path, [change])


SOURCES = """
[data.sources.en]
files = ["a.txt"]
weight = 0.5
[data.sources.zh]
weight = 0.25
"""


@given(st.lists(st.text()), st.floats(min_value=0, exclude_min=True, allow_infinity=False))
def test_any_string_and_number_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], lr: float
) -> None:
    config = RunConfig(
        tiny("deepseek-v2"),
        TrainConfig(steps=1, optim=OptimConfig(lr=lr)),
        DataConfig(tuple(names), seq_len=8),
    )
    assert reload(config, tmp_path_factory.mktemp("run")) == config


def test_each_kind_of_rope_scaling_is_told_from_the_others(tmp_path: Path) -> None:
    for family in ("deepseek-v3", "llama-3.1-405b"):
        scaling = FAMILIES[family].config.rope.scaling
        assert scaling is not None
        assert type(reload_model(tiny(family), tmp_path).rope.scaling) is type(scaling)
    linear = replace(tiny("llama-2-7b"), rope=RopeConfig(scaling=LinearScaling(4.0)))
    assert reload_model(linear, tmp_path) == linear


def reload_model(model: ModelConfig, folder: Path) -> ModelConfig:
    return reload(RunConfig(model, TrainConfig(steps=1), DataConfig(seq_len=8)), folder).model


def test_overrides_are_toml_values_in_order(recipe: Path) -> None:
    config = load_recipe(
        recipe,
        [
            "train.steps=9",
            "train.optim.lr=2",
            "train.optim.lr=3e-4",
            "train.optim.schedule=cosine",
            'data.train=["c.txt"]',
            "model.moe.n_group=1",
            "model.moe.topk_group = 1",
            "model.eos_token_id=[1, 2]",
        ],
    )
    assert (config.train.steps, config.train.optim.lr, config.train.optim.schedule) == (9, 3e-4, "cosine")
    assert config.data.train == ("c.txt",)
    assert config.model.eos_token_id == (1, 2)
    assert config.model.moe is not None
    assert config.model.moe.n_group == 1


def test_none_takes_a_part_out(recipe: Path) -> None:
    config = load_recipe(
        recipe, ["model.moe=none", "model.rope.scaling=none", "model.max_position_embeddings=64"]
    )
    assert config.model.moe is None
    assert config.model.rope.scaling is None


def test_a_part_written_in_full_as_another_kind_takes_its_place(recipe: Path) -> None:
    heads = "{ num_attention_heads = 4, num_key_value_heads = 2, head_dim = 16 }"
    assert load_recipe(recipe, [f"model.attention={heads}"]).model.attention == GQAConfig(4, 2, 16)
    linear = load_recipe(recipe, ["model.rope.scaling={factor = 2.0, original_max_position_embeddings = 9}"])
    assert linear.model.rope.scaling == YarnScaling(
        2.0, 9, mscale=1.0, mscale_all_dim=1.0
    )  # the same kind: changed


def test_a_model_needs_no_family(recipe: Path) -> None:
    model = tiny("llama-3-8b")
    lines = to_toml(RunConfig(model, TrainConfig(steps=1), DataConfig(seq_len=8)))
    assert "family" not in lines
    recipe.write_text(lines)
    assert load_recipe(recipe).model == model
    assert isinstance(load_recipe(recipe).model.attention, GQAConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # an unknown key, with the nearest valid one
        ("train.stepz=5", "train has no key 'stepz'; the nearest is 'steps'"),
        ("trian.steps=5", "the recipe has no key 'trian'; the nearest is 'train'"),
        ("model.moe.n_expert=4", "model.moe has no key 'n_expert'; the nearest is 'n_shared_experts'"),
        ("model.famly=v3", "model has no key 'famly'; the nearest is 'family'"),
        ("model.attention.kv_rank=4", "model.attention has no key 'kv_rank'; the nearest is 'kv_lora_rank'"),
        # a wrong type, with the right one
        ("train.steps=many", "train.steps is 'many'; it must be an integer"),
        ("train.steps=1.5", "train.steps is 1.5; it must be an integer"),
        ("train.steps=true", "train.steps is True; it must be an integer"),
        ("train.optim.lr=fast", "train.optim.lr is 'fast'; it must be a number"),
        ("train.optim.betas=[0.9]", "train.optim.betas is [0.9]; it must be a list, 2 of a number"),
        ("data.train=a.txt", "data.train is 'a.txt'; it must be a list, a string"),
        ("train.optim=5", "train.optim is 5; it must be a table"),
        ("model=5", "model is 5; it must be a table"),
        ("model.tie_word_embeddings=1", "model.tie_word_embeddings is 1; it must be true or false"),
        ("train.optim.schedule=cosin", "'cosine', 'multi_step', 'linear' (did you mean 'cosine'?)"),
        ("model.family=deepseek-v33", "no family is named 'deepseek-v33'; nearest are deepseek-v3"),
        # degrees that cannot be, in the words of the part that refuses
        ("model.moe.num_experts_per_tok=33", "model.moe: num_experts_per_tok is 33 but there are 32 routed"),
        ("model.moe.n_group=5", "model.moe: n_routed_experts 32 is not divisible by n_group 5"),
        ("data.seq_len=4096", "data.seq_len is 4096, beyond the 2560 positions of the model"),
        ("data.tokens_per_batch=32", "tokens_per_batch is 32, less than one sequence of seq_len 64"),
        ("data.holdout_fraction=1", "data: holdout_fraction is 1.0; it must lie between 0 and 1"),
        ("train.optim.lr=-1", "train.optim: lr is -1.0; it must be positive and finite"),
        ("train.keep=0", "train: keep is 0; it must be at least 1"),
        ("train.optim.warmup_steps=60", "warmup_steps is 60, more than the run's 50 steps"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_place_and_remedy(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"recipe\.toml") as error:
        load_recipe(recipe, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_heads_that_do_not_divide_are_one_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'model = { family = "llama-3-8b", tiny = true }\ntrain = { steps = 1 }\ndata = { seq_len = 8 }\n'
    )
    with pytest.raises(
        ValueError, match=r"model\.attention: num_attention_heads 4 is not divisible by .* 3;"
    ):
        load_recipe(recipe, ["model.attention.num_key_value_heads=3"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nsteps = 1\n", "model is missing"),
        ('model = { family = "deepseek-v3", tiny = true }', "train is missing"),
        ("model = { tiny = true }\ntrain = { steps = 1 }", "model.tiny needs model.family"),
        ("model = {", "is not TOML"),
    ],
)
def test_an_incomplete_recipe_says_what_is_missing(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_recipe(path)


def test_an_override_is_a_key_and_a_value(recipe: Path) -> None:
    for override in ("train.steps", "=5"):
        with pytest.raises(ValueError, match=r"write it as a\.b=value"):
            load_recipe(recipe, [override])


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe at .*absent\.toml"):
        load_recipe(tmp_path / "absent.toml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_house_are_whole(path: Path, tmp_path: Path) -> None:
    config = load_recipe(path)
    assert reload(config, tmp_path) == config
