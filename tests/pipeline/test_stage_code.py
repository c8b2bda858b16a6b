"""The modules whose digests a stage's results depend on, by name.

A stage's manifest keeps a digest of each of our modules that it computes with. A change to one of
them puts every stored result of the stage in doubt, so a module must not get in by accident.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import grimp
import pytest

from rlhf_exp.pipeline.plan import stage_code

ROOT = Path(__file__).parents[2]


def names(folder: str, files: str) -> set[str]:
    return {f"{folder}/{file}" for file in files.split()}


# The data and the models that every stage is given, in the processes that it runs in.
COMMON = (
    {"batch", "user_function"}
    | names("algo", "logprobs masks")
    | names(
        "data",
        "batching chat_template chosen_answers files jsonl layouts literal_text parsing "
        "rated_responses record_fields rows sources tokenized tokenizer",
    )
    | names("data/toy", "content generate")
    | {"data/arithmetic"}
    | names("distributed", "ddp deepspeed fsdp strategy world")
    | names(
        "models",
        "architecture cpu_attention frozen_trunk logit_transform lora packing policy pretrained",
    )
    | names("stages", "context data_module setup")
)
# The native trainer, and the model that it leaves.
TRAINER = (
    {"algo/losses"}
    | names("training", "checkpoint metrics optim result task trainer")
    | names("stages", "publish training")
)
# By vLLM; left out where a stage samples natively (see `test_changed_code.py`).
VLLM = {"vllm/cuda_handles", "vllm/engine", "vllm/server", "vllm/worker/vllm_worker"}
SAMPLING = (
    {"models/reference"}
    | VLLM
    | names(
        "rollout",
        "decoder engine gptj_attention library_cache native_engine sampler slot_cache step_graphs "
        "token_sampling transcript",
    )
)
# The scores of responses: by the reward model, a function or a server.
SCORING = (
    {"algo/kl", "algo/preference", "http_client", "models/reward_model", "safe_text"}
    | names("training", "reward_scorer reward_terms scorers")
    | {"stages/scorers"}
)

# Another trainer, in an interpreter of its own.
ENGINE = (
    names("engines", "conversation handover iteration process session")
    | names("engines/worker", "__main__ engine_line engine_model")
    | names("stages", "engine publish")
    | {"training/result"}
)
TRL = (
    {"rollout/transcript", "training/optim"}
    | names("trl", "metrics plan responses")
    | names("trl/worker", "trl_common trl_pairs trl_rollouts trl_worker")
)

ALLOWED = {
    "sft": COMMON | TRAINER | {"training/sft"} | names("stages", "sft shape"),
    "reward": COMMON
    | TRAINER
    | {"algo/preference", "evaluation/statistics", "models/reward_model"}
    | names("training", "reward reward_scorer")
    | {"stages/reward"},
    "dpo": COMMON
    | TRAINER
    | SAMPLING
    | {"algo/kl", "training/dpo", "training/validation_answers"}
    | names("stages", "dpo dpo_inputs kept_tensor sampling"),
    # Neither losses nor a reference.
    "best_of": (COMMON | SAMPLING | SCORING | names("stages", "best_of sampling"))
    - {"algo/kl", "algo/preference", "models/reference"},
    "ppo": COMMON
    | TRAINER
    | SAMPLING
    | SCORING
    | {"algo/advantages", "algo/importance", "algo/rounding", "distributed/redistribute"}
    | {"rollout/ahead_engine", "rollout/trunk_pass"}
    | names("training", "ppo ppo_objective ppo_validation streamed_scoring validation_answers")
    | names("stages", "kept_tensor ppo ppo_inputs sampling"),
    "trlx_ppo": COMMON
    | SCORING
    | ENGINE
    | {"algo/advantages", "algo/rounding", "training/ppo_objective"}
    | names("trlx", "convert metrics plan")
    | names("trlx/worker", "trlx_trainer trlx_worker")
    | names("stages", "kept_tensor ppo_inputs trlx_ppo"),
    "trl_ppo": COMMON
    | SCORING
    | ENGINE
    | TRL
    | {"algo/advantages", "algo/rounding", "training/ppo_objective"}
    | names("stages", "kept_tensor ppo_inputs trl_ppo"),
    "trl_dpo": COMMON
    | TRAINER
    | (ENGINE - {"engines/session"})
    | TRL
    | {"trl/pair_session"}
    | names("stages", "dpo_inputs trl_dpo"),
    "eval": COMMON
    | SAMPLING
    | SCORING
    | {"algo/rounding", "data/toy/gold_judge", "rewards/arithmetic"}
    | names("evaluation", "agreement answers comparison frontier harness harness_tasks")
    | names("evaluation", "overoptimisation preference reward_quality statistics")
    | names("evaluation/judges", "human_agreement llm protocol reward_models")
    | names("evaluation/toxicity", "prompts scorers summary")
    | {"stages/eval", "stages/sampling"}
    | {"stages/kept_tensor"}
    | names("stages/evaluation", "answer_sources best_of_n evaluation gold_judge harness")
    | names("stages/evaluation", "kept_samples preference reward_quality toxicity toxicity_scorer"),
}


def chain(stage: str, module: str) -> str:
    """Return the shortest way by which a stage imports a module, in words."""
    graph = grimp.build_graph("rlhf_exp", exclude_type_checking_imports=True, cache_dir=None)
    target = f"rlhf_exp.{module.replace('/', '.')}"
    entries = [f"rlhf_exp.stages.{stage}", "rlhf_exp.stages.data_module"]
    paths = deque([[entry] for entry in entries])
    seen = set(entries)
    while paths:
        path = paths.popleft()
        if path[-1] == target:
            return " -> ".join(path)
        for following in sorted(graph.find_modules_directly_imported_by(path[-1]) - seen):
            seen.add(following)
            paths.append([*path, following])
    return f"{target} is named in a string"


@pytest.mark.parametrize("stage", ALLOWED)
def test_a_stage_digests_these_modules_and_no_others(stage: str) -> None:
    digested = {path.removeprefix("rlhf_exp/").removesuffix(".py") for path in stage_code(stage)}
    assert len(stage_code(stage)) == len(digested)
    new, gone = sorted(digested - ALLOWED[stage]), sorted(ALLOWED[stage] - digested)
    found = "".join(f"\n  {module}: {chain(stage, module)}" for module in new)
    assert not new, (
        f"{stage} now digests further modules, each change of which puts its stored results in "
        f"doubt:{found}\nIf a module takes part in the numbers of the stage, add it to ALLOWED. If "
        "not, move the imported part into a module of its own, pass it through the StageContext, "
        "or import it under TYPE_CHECKING."
    )
    assert not gone, f"{stage} no longer digests {', '.join(gone)}: take them out of ALLOWED"


def test_every_stage_has_its_list() -> None:
    """All that `pipeline/` can run and keep; stand-ins for a probe's models are not kept."""
    modules = {path.stem for path in (ROOT / "rlhf_exp" / "stages").glob("*.py")}
    runs = {
        name
        for name in modules
        if "def run(config: Config, context: StageContext)"
        in (ROOT / "rlhf_exp" / "stages" / f"{name}.py").read_text(encoding="utf-8")
    }
    assert runs - {"placeholders"} == ALLOWED.keys()
