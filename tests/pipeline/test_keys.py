from __future__ import annotations

import copy
import shutil
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from rlhf_exp.config.compose import compose
from rlhf_exp.config.evaluation import ROLES, Suite
from rlhf_exp.config.experiment import (
    Attention,
    Config,
    DataSource,
    Dtype,
    EngineName,
    PrecisionName,
    PromptFormat,
    StrategyName,
    TrackingMode,
)
from rlhf_exp.config.schema_keys import CONF
from rlhf_exp.pipeline.keys import Keys
from rlhf_exp.store.fingerprint import DigestCache
from tests.lab import small_config

STAGES = ("sft", "reward", "ppo", "eval")
FIXED = {"sft": "a", "reward": "b", "ppo": "c"}


def keys_of(config: Config, cache: Path) -> Keys:
    return Keys(config, DigestCache(cache / "digests.json"))


def chain(config: Config, cache: Path) -> dict[str, str]:
    """Return each stage's key, every stage built on those before it."""
    keys, found = keys_of(config, cache), {}
    found["sft"] = keys.sft()
    found["reward"] = keys.reward({"sft": found["sft"]})
    found["ppo"] = keys.ppo(dict(found))
    found["eval"] = keys.eval(dict(found), list(ROLES))
    return found


def alone(config: Config, cache: Path) -> dict[str, str]:
    """Return each stage's key with the same parents, whatever the parents' own keys are."""
    keys = keys_of(config, cache)
    return {
        "sft": keys.sft(),
        "reward": keys.reward({"sft": "a"}),
        "ppo": keys.ppo({"sft": "a", "reward": "b"}),
        "eval": keys.eval(FIXED, list(ROLES)),
    }


def differing(first: dict[str, str], second: dict[str, str]) -> list[str]:
    return [stage for stage in STAGES if first[stage] != second[stage]]


def changed(config: Config, key: str, value: Any) -> Config:
    other = copy.deepcopy(config)
    section, _, name = key.rpartition(".")
    holder = attrgetter(section)(other) if section else other
    assert getattr(holder, name) != value, "a change that changes nothing shows nothing"
    setattr(holder, name, value)
    return other


@pytest.fixture(scope="module")
def config() -> Config:
    return small_config(Path("outputs"))


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [
        ("sft.lr", 0.5, "sft"),
        ("sft.seed", 7, "sft"),
        ("sft.lora.rank", 4, "sft"),
        ("model.seed", 7, "sft"),
        ("model.dtype", Dtype.bfloat16, "sft"),
        ("model.architecture.width", 64, "sft"),
        ("data.toy.seed", 7, "sft"),
        ("data.format", PromptFormat.plain, "sft"),
        ("distributed.precision", PrecisionName.bfloat16, "sft"),
        ("reward.lr", 0.5, "reward"),
        ("reward.seed", 7, "reward"),
        ("ppo.kl.coef", 0.5, "ppo"),
        ("ppo.seed", 7, "ppo"),
        ("ppo.reward.clip", None, "ppo"),
        ("ppo.generation.max_new_tokens", 9, "ppo"),
        ("ppo.rollouts", 16, "ppo"),
        ("ppo.eval_every", 7, "ppo"),
        ("eval.temperature", 0.0, "eval"),
        ("eval.seed", 7, "eval"),
        ("eval.prompts", 7, "eval"),
    ],
)
def test_a_change_counts_from_its_stage_on(
    config: Config, key: str, value: Any, first: str, tmp_path: Path
) -> None:
    before, after = chain(config, tmp_path), chain(changed(config, key, value), tmp_path)
    assert differing(before, after) == list(STAGES[STAGES.index(first) :])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sft.micro_batch", 2),
        ("reward.micro_batch", 2),
        ("ppo.micro_batch", 2),
        ("ppo.generation.batch", 2),
        ("eval.batch", 2),
        ("sft.gradient_checkpointing", True),
        ("ppo.checkpoint_every", 7),
        ("ppo.keep_checkpoints", 7),
        ("ppo.reward.placement", "cpu"),
        ("ppo.keep_state", True),
        ("ppo.continue_from", "first"),  # the key of that run counts, see below
        ("ppo.reward.timeout_s", 7.0),
        ("distributed.threads", 2),
        ("distributed.processes", 4),
        ("distributed.strategy", StrategyName.ddp),
        ("model.attention", Attention.eager),
        ("model.name", "other"),
        ("tracking.mode", TrackingMode.offline),
        ("tracking.project", "other"),
        ("tracking.tags", ["x"]),
        ("output_dir", "elsewhere"),
        ("name", "other"),
        ("rerun", ["sft"]),
        ("plan", True),
        ("seed", 7),  # the stages' own seeds are resolved already
    ],
)
def test_what_does_not_change_the_result_is_in_no_key(
    config: Config, key: str, value: Any, tmp_path: Path
) -> None:
    assert chain(changed(config, key, value), tmp_path) == chain(config, tmp_path)


def test_values_count_and_not_the_overrides_that_led_to_them(tmp_path: Path) -> None:
    base = chain(compose([], [CONF]).config, tmp_path)
    (tmp_path / "mine" / "ppo").mkdir(parents=True)
    (tmp_path / "mine" / "ppo" / "bold.yaml").write_text("lr: 0.5\n")
    by_file = compose(["ppo=bold"], [CONF, tmp_path / "mine"]).config
    by_hand = compose(["ppo.lr=0.5"], [CONF]).config
    assert chain(by_file, tmp_path) == chain(by_hand, tmp_path)
    assert differing(chain(by_hand, tmp_path), base) == ["ppo", "eval"]
    # A default written out is no change; a default that is edited is one.
    assert chain(compose([f"sft.lr={by_hand.sft.lr}"], [CONF]).config, tmp_path) == base
    (tmp_path / "mine" / "ppo" / "bold.yaml").write_text("lr: 0.25\n")
    edited = compose(["ppo=bold"], [CONF, tmp_path / "mine"]).config
    assert differing(chain(edited, tmp_path), chain(by_file, tmp_path)) == ["ppo", "eval"]


def test_one_seed_for_all_is_each_stages_own(tmp_path: Path) -> None:
    together = compose(["seed=3"], [CONF]).config
    one_by_one = compose(["sft.seed=3", "reward.seed=3", "ppo.seed=3"], [CONF]).config
    assert chain(together, tmp_path) == chain(one_by_one, tmp_path)


@pytest.fixture
def with_files(config: Config, tmp_path: Path) -> Config:
    """A config that reads four files; keys digest them and never parse them."""
    own = copy.deepcopy(config)
    own.data.source = DataSource.jsonl
    for name in ("preferences", "demonstrations", "prompts", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f"{name}\n")
        setattr(own.data, name, str(tmp_path / f"{name}.jsonl"))
    return own


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("preferences", ["sft", "reward", "ppo", "eval"]),
        ("test", ["sft", "reward", "ppo", "eval"]),
        ("demonstrations", ["sft", "reward"]),
        # SFT too: the tokenizer from scratch learns from the prompts.
        ("prompts", ["sft", "ppo", "eval"]),
    ],
)
def test_a_files_content_counts_where_it_is_read(
    with_files: Config, name: str, readers: list[str], tmp_path: Path
) -> None:
    before = alone(with_files, tmp_path)
    (tmp_path / f"{name}.jsonl").write_text("other\n")
    assert differing(before, alone(with_files, tmp_path)) == readers


def test_the_prompts_do_not_count_for_sft_with_a_tokenizer_of_its_own(
    with_files: Config, tmp_path: Path
) -> None:
    with_files.model.path = str(tmp_path / "model")
    (tmp_path / "model").mkdir()
    before = alone(with_files, tmp_path)
    (tmp_path / "prompts.jsonl").write_text("other\n")
    assert differing(before, alone(with_files, tmp_path)) == ["ppo", "eval"]


def test_demonstrations_count_for_ppo_where_it_asks_their_prompts(
    with_files: Config, tmp_path: Path
) -> None:
    with_files.data.prompts = None
    before = alone(with_files, tmp_path)
    (tmp_path / "demonstrations.jsonl").write_text("other\n")
    assert differing(before, alone(with_files, tmp_path)) == ["sft", "reward", "ppo", "eval"]


def test_where_a_file_lies_does_not_count(with_files: Config, tmp_path: Path) -> None:
    before = chain(with_files, tmp_path)
    (tmp_path / "preferences.jsonl").rename(tmp_path / "moved.jsonl")
    with_files.data.preferences = str(tmp_path / "moved.jsonl")
    assert chain(with_files, tmp_path) == before


def test_the_files_of_a_local_data_set_count(config: Config, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("one\n")
    of_hub = copy.deepcopy(config)
    of_hub.data.source, of_hub.data.path = DataSource.hub, str(tmp_path / "set")
    of_files = copy.deepcopy(config)
    of_files.data.source, of_files.data.preferences = DataSource.jsonl, str(tmp_path / "set")
    before = [alone(own, tmp_path) for own in (of_hub, of_files)]
    (tmp_path / "set" / "train.jsonl").write_text("other\n")
    after = [alone(own, tmp_path) for own in (of_hub, of_files)]
    assert [differing(*both) for both in zip(before, after, strict=True)] == [list(STAGES)] * 2


def test_a_reward_functions_source_counts_and_its_place_does_not(
    config: Config, tmp_path: Path
) -> None:
    file, moved = tmp_path / "mine.py", tmp_path / "moved.py"
    file.write_text("def score(prompts, responses): return [0.0] * len(prompts)\n")
    without, own = alone(config, tmp_path), copy.deepcopy(config)
    own.ppo.reward.function = f"{file}:score"
    before = alone(own, tmp_path)
    assert differing(without, before) == ["ppo", "eval"]
    shutil.copy(file, moved)
    own.ppo.reward.function = f"{moved}:score"
    assert alone(own, tmp_path) == before
    own.ppo.reward.function = f"{moved}:other"
    assert differing(alone(own, tmp_path), before) == ["ppo", "eval"]
    moved.write_text(moved.read_text().replace("0.0", "1.0"))
    own.ppo.reward.function = f"{moved}:score"
    assert differing(alone(own, tmp_path), before) == ["ppo", "eval"]


def test_a_servers_address_counts_unless_what_scores_is_named(
    config: Config, tmp_path: Path
) -> None:
    def keys(url: str, name: str | None = None) -> dict[str, str]:
        own = copy.deepcopy(config)
        own.ppo.reward.url, own.ppo.reward.name = url, name
        return alone(own, tmp_path)

    without, bare = alone(config, tmp_path), keys("http://a:1")
    assert differing(without, bare) == ["ppo", "eval"]
    assert differing(bare, keys("http://b:1")) == ["ppo", "eval"]
    named = keys("http://a:1", "mine")
    assert differing(bare, named) == ["ppo", "eval"]
    assert keys("http://b:1", "mine") == named
    assert differing(keys("http://a:1", "other"), named) == ["ppo", "eval"]
    assert differing(bare, keys("http://c:1", "http://a:1")) == ["ppo", "eval"]


def test_the_run_that_is_gone_on_from_counts(config: Config, tmp_path: Path) -> None:
    keys, parents = keys_of(config, tmp_path), {"sft": "a", "reward": "b"}
    found = {keys.ppo(parents), keys.ppo(parents, "c"), keys.ppo(parents, "d")}
    assert len(found) == 3


def test_a_model_folder_counts_by_content(config: Config, tmp_path: Path) -> None:
    folder, own = tmp_path / "model", copy.deepcopy(config)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    own.model.path = str(folder)
    before = chain(own, tmp_path)
    folder.rename(tmp_path / "moved")
    own.model.path = str(tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("a card is not the model")
    assert chain(own, tmp_path) == before
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"Weights")
    assert differing(chain(own, tmp_path), before) == list(STAGES)


def test_the_number_format_counts_for_a_given_model_too(config: Config, tmp_path: Path) -> None:
    other = changed(config, "model.dtype", Dtype.bfloat16)
    assert differing(alone(config, tmp_path), alone(other, tmp_path)) == list(STAGES)


def test_how_far_a_given_reward_model_reads_counts(config: Config, tmp_path: Path) -> None:
    other = changed(config, "reward.seq_length", 256)
    assert differing(alone(config, tmp_path), alone(other, tmp_path)) == ["reward", "ppo", "eval"]


@pytest.fixture
def toxic(config: Config, tmp_path: Path) -> Config:
    """A config whose evaluation reads a file of prompts and a function; keys never parse them."""
    own = copy.deepcopy(config)
    own.eval.suite = Suite.blog
    (tmp_path / "prompts.jsonl").write_text("prompts\n")
    (tmp_path / "mine.py").write_text("def score(texts): ...\n")
    own.eval.toxicity.data = str(tmp_path / "prompts.jsonl")
    own.eval.toxicity.scorer = f"{tmp_path / 'mine.py'}:score"
    return own


@pytest.mark.parametrize("key", ["prompts", "seed", "generations", "max_new_tokens"])
def test_toxicity_counts_where_it_is_measured(config: Config, key: str, tmp_path: Path) -> None:
    other = changed(config, f"eval.toxicity.{key}", 7)
    assert alone(other, tmp_path) == alone(config, tmp_path)  # eval=quick
    config, other = (changed(one, "eval.suite", Suite.blog) for one in (config, other))
    assert differing(alone(config, tmp_path), alone(other, tmp_path)) == ["eval"]


def test_toxicity_prompts_and_scorer_count_by_content(toxic: Config, tmp_path: Path) -> None:
    before = alone(toxic, tmp_path)
    for name in ("prompts.jsonl", "mine.py"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    toxic.eval.toxicity.data = str(tmp_path / "moved-prompts.jsonl")
    toxic.eval.toxicity.scorer = f"{tmp_path / 'moved-mine.py'}:score"
    assert alone(toxic, tmp_path) == before
    (tmp_path / "moved-prompts.jsonl").write_text("others\n")
    after = alone(toxic, tmp_path)
    assert differing(before, after) == ["eval"]
    (tmp_path / "moved-mine.py").write_text("def score(texts): return []\n")
    assert differing(after, alone(toxic, tmp_path)) == ["eval"]


def test_the_scorer_of_the_quick_comparison_counts_by_content(
    config: Config, toxic: Config, tmp_path: Path
) -> None:
    toxic.eval.suite = Suite.quick
    before = alone(toxic, tmp_path)
    assert differing(before, alone(config, tmp_path)) == ["eval"]
    toxic.eval.toxicity.data = "gone"
    assert alone(toxic, tmp_path) == before
    (tmp_path / "mine.py").write_text("def score(texts): return []\n")
    assert differing(before, alone(toxic, tmp_path)) == ["eval"]
    named = changed(config, "eval.toxicity.scorer", "org/judge")
    other = changed(named, "eval.toxicity.label", "hate")
    assert differing(alone(named, tmp_path), alone(other, tmp_path)) == ["eval"]
    toxic.eval.suite = config.eval.suite = Suite.reward_quality
    assert alone(toxic, tmp_path) == alone(config, tmp_path)


def test_stored_answers_bring_their_prompts(toxic: Config, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    samples.write_text("{}\n")
    toxic.eval.samples = str(samples)
    before = keys_of(toxic, tmp_path).recomputed(samples)
    (tmp_path / "prompts.jsonl").unlink()
    assert keys_of(toxic, tmp_path).recomputed(samples) == before
    toxic.eval.toxicity.generations = 2
    assert keys_of(toxic, tmp_path).recomputed(samples) != before


@pytest.mark.parametrize(
    ("name", "value", "counts"),
    [("correction", "3", False), ("ahead", 1, False), ("temperature", 0.5, True)],
)
def test_how_ppo_learns_does_not_count_for_the_best_of_n(
    config: Config, name: str, value: Any, counts: bool, tmp_path: Path
) -> None:
    other = changed(config, f"ppo.generation.{name}", value)
    parents = {"sft": "a", "reward": "b"}
    keys = {keys_of(one, tmp_path).best_of(parents) for one in (config, other)}
    assert (len(keys) == 2) is counts


def test_the_engine_counts_for_ppo_alone(config: Config, tmp_path: Path) -> None:
    """SFT and the reward model are native in either case, and shared."""
    trlx = changed(config, "engine.name", EngineName.trlx)
    assert differing(chain(config, tmp_path), chain(trlx, tmp_path)) == ["ppo", "eval"]
    assert differing(alone(config, tmp_path), alone(trlx, tmp_path)) == ["ppo"]


def test_each_engine_counts_for_the_stages_that_it_does(config: Config, tmp_path: Path) -> None:
    trlx, trl = (changed(config, "engine.name", name) for name in (EngineName.trlx, EngineName.trl))
    native, by_trlx, by_trl = (
        keys_of(one, tmp_path).dpo({"sft": "s"}) for one in (config, trlx, trl)
    )
    assert native == by_trlx != by_trl
    parents = {"sft": "s", "reward": "r"}
    assert len({keys_of(one, tmp_path).ppo(parents) for one in (config, trlx, trl)}) == 3


def test_the_parts_that_answer_together_count_with_trl(tmp_path: Path) -> None:
    """Its evaluations draw noise part by part, and choose the weights that are published."""
    native = small_config(tmp_path)
    for config, differs in (
        (native, False),
        (changed(native, "engine.name", EngineName.trl), True),
    ):
        rollouts = changed(config, "ppo.generation.batch", 2)
        pairs = changed(config, "dpo.generation.batch", 2)
        parents = {"sft": "s", "reward": "r"}
        ppo = {keys_of(one, tmp_path).ppo(parents) for one in (config, rollouts)}
        dpo = {keys_of(one, tmp_path).dpo({"sft": "s"}) for one in (config, pairs)}
        assert (len(ppo) > 1, len(dpo) > 1) == (differs, differs)


def test_the_parts_that_are_sampled_together_count_with_trlx(
    config: Config, tmp_path: Path
) -> None:
    parts = changed(config, "ppo.generation.batch", 7)
    assert chain(parts, tmp_path) == chain(config, tmp_path)
    pair = [changed(one, "engine.name", EngineName.trlx) for one in (config, parts)]
    first, second = (chain(one, tmp_path) for one in pair)
    assert differing(first, second) == ["ppo", "eval"]
