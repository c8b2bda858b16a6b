"""The store's keys are those of before: a stored result is found again.

`golden_keys.json` has the keys of every experiment and of every option as they were when the file
was written. A changed key loses the users' results, so rewrite the file only if a key changes on
purpose, and say so in the changelog:

    python -m tests.pipeline.test_golden_keys
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest

from rlhf_exp.config.compose import compose
from rlhf_exp.config.schema_keys import CONF, read_groups
from rlhf_exp.pipeline.plan import plan

GOLDEN = Path(__file__).with_name("golden_keys.json")
BASE = "experiment=smoke"
# Options of these say where and when to compute; a sweep composes many points.
NO_RESULTS = ("stage", "tracking", "sweep", "hydra/launcher", "experiment")

# Files whose content counts; a key has no path in it.
FILES = {
    "preferences.jsonl": "pairs\n",
    "test.jsonl": "held out\n",
    "demonstrations.jsonl": "demonstrations\n",
    "prompts.jsonl": "prompts\n",
    "samples.jsonl": "answers\n",
    "labels.jsonl": "votes\n",
    "mine.py": "def score(prompts, responses): ...\n",
    "model/config.json": "{}\n",
    "model/model.safetensors": "weights\n",
}
LOCAL = "data=hh_local data.preferences=FILES/preferences.jsonl data.test=FILES/test.jsonl"
FULL = "eval=full eval.toxicity.data=FILES/prompts.jsonl"

FURTHER = (
    "stage=sft",
    "data=arithmetic data.arithmetic.right=0.7",
    "stage=reward",
    "stage=reward reward.init=base",
    "stage=dpo",
    "stage=dpo dpo.loss=ipo dpo.train_blocks=1",
    "stage=ppo",
    "stage=eval",
    "seed=1",
    "reward.part=1/2 reward.seed=3",
    "sft.lora.rank=4 sft.lora.targets=[q_proj] ppo.train_blocks=1 ppo.value_trunk=branch",
    "ppo.value_trunk=own ppo.value_init=reward ppo.select_by=win_rate ppo.kl.budget=2",
    "ppo.reward.function=FILES/mine.py:score",
    "ppo.reward.function=FILES/mine.py:score ppo.value_init=reward",
    "ppo.reward.url=http://127.0.0.1:8480",
    "ppo.reward.url=http://127.0.0.1:8480 ppo.reward.name=judge",
    "ppo.reward.terms=[{model:default},{function:'FILES/mine.py:score',weight:0.2},{length:{target:9}}]",
    "ppo.reward.terms=[{models:[default,FILES/model],combine:min}] ppo.reward.ensemble_stop=2",
    "model.dtype=bfloat16",
    "model.path=FILES/model",
    "model.path=org/model model.revision=main",
    "sft.use=org/sft reward.use=FILES/model",
    f"{LOCAL} data.demonstrations=FILES/demonstrations.jsonl data.prompts=FILES/prompts.jsonl",
    f"{LOCAL} model.path=FILES/model data.prompts=FILES/prompts.jsonl",
    "eval.models=[sft,org/other]",
    "eval.models=[sft,dpo,ppo]",
    "eval.top_p=0.9 eval.top_k=5 eval.max_new_tokens=12",
    "eval.best_of=[1,4] eval.harness.tasks=[arc_easy]",
    "eval.judge.names=[reward,model] eval.judge.model=FILES/model",
    "eval.judge.names=[llm] eval.judge.llm=judge eval.judge.url=http://127.0.0.1:1",
    "eval.judge.labels=FILES/labels.jsonl eval.judge.pairs=5",
    "eval.toxicity.scorer=org/classifier eval.toxicity.label=toxic",
    "eval.samples=FILES/samples.jsonl",
    f"{FULL} eval.toxicity.scorer=FILES/mine.py:score eval.toxicity.temperature=0.5",
    f"{FULL} eval.reward_quality.referee=org/referee eval.reward_quality.best_of=4",
    f"{FULL} eval.samples=FILES/samples.jsonl",
)
"""Overrides of the base whose keys are made in ways of their own."""


def cases() -> list[str]:
    """Return the overrides whose keys are kept."""
    groups = read_groups()
    found = []
    for name in groups["experiment"].options:
        local = f" {LOCAL}" if name == "hh_small" else ""
        found += [f"experiment={name}{local} engine={engine}" for engine in ("native", "trlx")]
    for group, content in groups.items():
        if group not in NO_RESULTS:
            for option in content.options:
                chosen = LOCAL if option == "hh_local" else f"{group}={option}"
                found.append(f"{BASE} {chosen}")
    found += [f"{BASE} {further}" for further in FURTHER]
    return list(dict.fromkeys(found))


def write_files(folder: Path) -> Path:
    """Write the files that the cases name, and return the folder."""
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def keys_of(case: str, files: Path) -> dict[str, str]:
    """Return the key of each step that a case's overrides plan."""
    overrides = [*case.replace("FILES", str(files)).split(), f"output_dir={files / 'outputs'}"]
    return {step.stage: step.key for step in plan(compose(overrides, [CONF]).config)}


def read_golden() -> dict[str, dict[str, str]]:
    """Return the keys of each case as they were."""
    found: dict[str, dict[str, str]] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("case", cases())
def test_the_keys_are_those_of_before(case: str, files: Path) -> None:
    assert keys_of(case, files) == read_golden()[case]


def test_nothing_that_had_keys_is_gone() -> None:
    assert list(read_golden()) == cases()


def write_golden() -> None:
    """Write the keys as they are now."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(Path(folder))
        found = {case: keys_of(case, files) for case in cases()}
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{GOLDEN}: {len(found)} cases", file=sys.stderr)


if __name__ == "__main__":
    write_golden()
