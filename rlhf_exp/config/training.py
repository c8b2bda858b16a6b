"""Config sections of the training stages: `sft`, `reward`, `dpo` and `ppo`.

`TrainingConfig` has the fields that they share: optimizer, schedule, trained parameters,
intervals of evaluations and checkpoints. How PPO uses a reward is `ppo.reward`; the section
`reward` trains the reward model.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from enum import Enum

from omegaconf import II

from rlhf_exp.config.fields import setting

CONTINUED = "continued"
"""Name of the finished run that `ppo.continue_from` extends, among an artifact's parents."""


class Schedule(Enum):
    """Learning-rate schedules, after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Select(Enum):
    """Which weights a stage publishes."""

    best = "best"
    last = "last"


@dataclass
class LoraConfig:
    """Low-rank adaptation (Hu et al. 2021)."""

    rank: int = setting(0, "Rank of the update; 0: no LoRA.")
    alpha: float = setting(16.0, "Scale of the update: alpha / rank.")
    targets: list[str] = setting(
        factory=list, doc="Names of the linear layers adapted; empty: the family's default."
    )


@dataclass
class TrainingConfig:
    """Fields of every training stage."""

    use: str | None = setting(
        None,
        "Use this hub id (`ORG/NAME` or `ORG/NAME@REVISION`), folder, run or store key instead of "
        "training.",
        key=False,
    )
    seed: int = setting(II("seed"), "Seed of this stage: data order, initial heads, sampling.")
    batch: int = setting(32, "Rows of an optimizer step, over all processes.")
    micro_batch: int | None = setting(
        None, "Rows of one forward and backward in a process; null: the whole share.", key=False
    )
    lr: float = setting(1e-3, "Peak learning rate of AdamW.")
    schedule: Schedule = setting(Schedule.constant, "Learning-rate schedule after warm-up.")
    warmup_steps: int = setting(0, "Optimizer steps of linear warm-up.")
    betas: list[float] = setting(factory=lambda: [0.9, 0.95], doc="AdamW's two betas.")
    weight_decay: float = setting(1e-6, "AdamW's weight decay, on matrices only.")
    grad_norm: float = setting(1.0, "Gradients are clipped to this L2 norm.")
    train_blocks: int | None = setting(
        None, "Train only the last k blocks, the final norm and an untied head; null: everything."
    )
    lora: LoraConfig = setting(factory=LoraConfig, doc="Low-rank adaptation.")
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass to save memory.", key=False
    )
    eval_every: int = setting(50, "Optimizer steps between evaluations on validation data.")
    checkpoint_every: int = setting(
        50, "Optimizer steps between checkpoints (PPO: at the next iteration's end).", key=False
    )
    keep_checkpoints: int = setting(
        2, "Number of latest checkpoints kept while training.", key=False
    )
    keep_every: int | None = setting(
        None,
        "The result also holds the model after every n-th optimizer step (PPO: at the next "
        "iteration's end), in `snapshots/`; null: none.",
        key=False,
    )
    keep: list[Select] = setting(
        factory=list,
        doc="Models that the result also holds, in `snapshots/`: `best`, `last`.",
        key=False,
    )
    select: Select = setting(Select.best, "Publish the weights best on validation, or the last.")


class LossOn(Enum):
    """Which tokens SFT learns to predict."""

    all = "all"
    response = "response"


@dataclass
class SftConfig(TrainingConfig):
    """Supervised fine-tuning."""

    steps: int | None = setting(None, "Optimizer steps; null: as `epochs` says.")
    epochs: float | None = setting(1.0, "Passes over the demonstrations, where `steps` is null.")
    seq_length: int = setting(256, "Longest sequence in tokens; longer prompts lose their start.")
    packing: bool = setting(True, "Put several demonstrations into one row of `seq_length` tokens.")
    loss_on: LossOn = setting(LossOn.all, "Learn whole dialogues, or responses only.")


class RewardInit(Enum):
    """Where the reward model's trunk comes from."""

    sft = "sft"
    base = "base"


@dataclass
class RewardConfig(TrainingConfig):
    """Reward model from pairwise preferences."""

    steps: int | None = setting(None, "Optimizer steps; null: as `epochs` says.")
    epochs: float | None = setting(1.0, "Passes over the pairs, where `steps` is null.")
    seq_length: int = setting(256, "Longest sequence in tokens; longer prompts lose their start.")
    part: str | None = setting(
        None,
        "Train on one part of the pairs, chosen by prompt, such as 1/2; null: on all.",
        neutral=None,
    )
    init: RewardInit = setting(RewardInit.sft, "Trunk: the SFT model's, or the base model's.")
    trunk: str | None = setting(
        None,
        "Hub id or folder whose config and tokenizer the model in `use` has, if it has none of its "
        "own: a published trunk with `v_head.weight`, see docs/how-to/rewards.md.",
        key=False,
    )


class Scale(Enum):
    """How scores are scaled before they become rewards."""

    none = "none"
    running = "running"
    reference = "reference"


class ValueInit(Enum):
    """Initial weights of the value head."""

    small = "small"
    reward = "reward"


class ValueTrunk(Enum):
    """What the value head reads.

    `shared`: the policy's final states; costs nothing, but both pull at the same weights. `branch`:
    a copy of the training blocks over the same frozen trunk. `own`: a whole model.
    """

    shared = "shared"
    branch = "branch"
    own = "own"


class AdvantageEstimator(Enum):
    """How advantages are estimated from rewards.

    `gae` (Schulman et al. 2016) reads a value function. The others have none: `rloo` (Ahmadian et
    al. 2024) and `grpo` (Shao et al. 2024) compare the responses to one prompt, `reinforce_pp` (Hu
    et al. 2025) whitens the rewards to come over all responses.
    """

    gae = "gae"
    rloo = "rloo"
    grpo = "grpo"
    reinforce_pp = "reinforce_pp"

    @property
    def groups(self) -> bool:
        """Whether the responses to one prompt are compared with each other."""
        return self in (AdvantageEstimator.rloo, AdvantageEstimator.grpo)


class GroupScale(Enum):
    """What GRPO divides by: the standard deviation of a prompt's rewards, or nothing.

    `none` is the variant without that bias (Liu et al. 2025, https://arxiv.org/abs/2503.20783).
    """

    std = "std"
    none = "none"


class LossMean(Enum):
    """What the policy's loss is a mean of.

    `tokens`: all response tokens of a minibatch alike. `sequences`: the means of its responses, so
    that a token of a long response counts less.
    """

    tokens = "tokens"
    sequences = "sequences"


class KlPlace(Enum):
    """Where the KL penalty is: in the reward of each token, or in the loss."""

    reward = "reward"
    loss = "loss"


class KlEstimator(Enum):
    """Estimators of the KL penalty, with d = log pi - log pi_ref.

    `k1`: d. `k2`: d^2 / 2. `k3`: exp(-d) - 1 + d. See http://joschu.net/blog/kl-approx.html.
    """

    k1 = "k1"
    k2 = "k2"
    k3 = "k3"


class SelectBy(Enum):
    """What `select=best` takes the most of.

    `reward`: reward less a penalty of KL, or within `kl.budget`. `win_rate`: wins over the initial
    policy's answers, within `kl.budget` if it is set.
    """

    reward = "reward"
    win_rate = "win_rate"


@dataclass
class KlConfig:
    """The KL penalty against the SFT policy."""

    coef: float = setting(0.05, "Penalty per nat, beta; the initial one if `target` is set.")
    target: float | None = setting(
        6.0, "Sequence KL in nats that the adaptive controller aims at; null: fixed `coef`."
    )
    horizon: int = setting(10000, "Rollouts over which the controller reacts.")
    where: KlPlace = setting(
        KlPlace.reward, "The penalty is in the reward, or in the loss.", neutral=KlPlace.reward
    )
    estimator: KlEstimator = setting(
        KlEstimator.k1, "Estimator of the penalty.", neutral=KlEstimator.k1
    )
    unbiased: bool = setting(
        True,
        "In the loss: give the penalty the gradient of the KL divergence; false: that of the "
        "estimator alone, as GRPO was published.",
        neutral=True,
    )
    stop: float | None = setting(
        None, "Stop training, with the last good weights, above this sequence KL in nats."
    )
    budget: float | None = setting(
        None,
        "`select=best` takes the most reward within this sequence KL in nats; null: the most "
        "reward minus a penalty.",
        neutral=None,
    )
    select_coef: float | None = setting(
        None, "Penalty per nat by which `select=best` judges; null: `coef`.", neutral=None
    )


class Combine(Enum):
    """What an ensemble of reward models says of a response (Coste et al. 2023).

    `mean` of their scores; `min`, the worst of them; `uncertainty`: the mean less `coef` times
    their standard deviation.
    """

    mean = "mean"
    min = "min"
    uncertainty = "uncertainty"


@dataclass
class LengthTermConfig:
    """A reward for responses of a certain length: 0 at the target, -1 at none or twice of it."""

    target: int = setting(128, "Length of a response in tokens.")


DEFAULT_MODEL = "default"
"""Name, in a term, of the reward model that the stage `reward` trains."""


@dataclass
class RewardTermConfig:
    """One of several rewards that are added up; exactly one of its sources is set."""

    weight: float = setting(1.0, "Factor of its scores.")
    model: str | None = setting(
        None,
        "A reward model: `default` (that of the stage `reward`), a run, key, folder or hub id.",
    )
    models: list[str] = setting(factory=list, doc="An ensemble of reward models, named likewise.")
    combine: Combine = setting(Combine.mean, "What the ensemble says.")
    coef: float = setting(1.0, "Standard deviations that `combine=uncertainty` subtracts.")
    function: str | None = setting(None, "A Python function, as in `ppo.reward.function`.")
    url: str | None = setting(None, "A reward server, as in `ppo.reward.url`.")
    length: LengthTermConfig | None = setting(None, "A length in tokens to keep to.")
    name: str | None = setting(
        None,
        "Its name in metrics and reports; null: its kind. Of a server also what it must call "
        "itself, and what counts instead of its address.",
    )

    @property
    def kind(self) -> str:
        """Which of its sources is set; what it is called where it has no name."""
        kinds = ("model", "function", "url", "length")
        found = next((kind for kind in kinds if getattr(self, kind) is not None), "ensemble")
        return "server" if found == "url" else found

    @property
    def specs(self) -> list[str]:
        """The reward models, as the config names them."""
        return self.models if self.model is None else [self.model]


@dataclass
class PpoRewardConfig:
    """How a response's score becomes PPO's reward."""

    delta: bool = setting(True, "Subtract the score of the data set's own response.")
    clip: float | None = setting(10.0, "Clip scores to plus or minus this; null: no clipping.")
    scale: Scale = setting(Scale.running, "Divide scores by a standard deviation.")
    missing_eos_penalty: float = setting(
        0.0, "Subtracted from the score of a response that had not ended."
    )
    function: str | None = setting(
        None,
        "A Python function instead of the reward model: `file.py:name` or `package.module:name`, "
        "see docs/how-to/rewards.md.",
    )
    url: str | None = setting(
        None,
        "A reward server instead of the reward model, such as http://127.0.0.1:8480, see "
        "docs/how-to/rewards.md; counts unless `name` is given.",
        neutral=None,
    )
    name: str | None = setting(
        None,
        "What scores at `url`: counts in its place, and must be what the server calls itself, if "
        "it says so.",
        neutral=None,
    )
    terms: list[RewardTermConfig] = setting(
        factory=list,
        doc="Several rewards instead of one, whose weighted scores are added up: see "
        "docs/how-to/rewards.md.",
        neutral=[],
    )
    ensemble_stop: float | None = setting(
        None,
        "Stop training, with the last good weights, when the scores of an ensemble's models have "
        "a standard deviation above this in the mean over responses; null: never.",
        neutral=None,
    )
    key_env: str | None = setting(
        None, "Environment variable with the server's key; null sends none.", key=False
    )
    request_size: int = setting(64, "Responses in one request to the server.", key=False)
    timeout_s: float = setting(120.0, "Seconds until a request to the server failed.", key=False)
    retries: int = setting(8, "Times that a failed request to the server is repeated.", key=False)
    placement: str = setting(
        "shared",
        "Where the reward model is: `shared` (each process has it on its own device), `gpu:N` or "
        "`cpu` (the main process alone has it there, and scores for all).",
        key=False,
    )

    @property
    def model_scores(self) -> bool:
        """Whether the reward model of the stage `reward` scores, alone or among others."""
        if self.terms:
            return any(DEFAULT_MODEL in term.specs for term in self.terms)
        return self.function is None and self.url is None

    @property
    def term_names(self) -> list[str]:
        """The terms' names in metrics and reports, each once: `model`, `function`, `model_2`."""
        names: list[str] = []
        for term in self.terms:
            # A server's name may be any text; a metric's has no slash or space.
            name = unique = re.sub(r"[^\w.-]+", "_", term.name or term.kind)
            number = 2
            while unique in names:
                unique, number = f"{name}_{number}", number + 1
            names.append(unique)
        return names

    @property
    def term_models(self) -> dict[str, str]:
        """The reward models of terms that no stage makes, by role: `reward_1` and so on."""
        specs = dict.fromkeys(spec for term in self.terms for spec in term.specs)
        others = [spec for spec in specs if spec != DEFAULT_MODEL]
        return {f"reward_{number}": spec for number, spec in enumerate(others, 1)}

    @property
    def kind(self) -> str:
        """What scores, in words."""
        if self.terms:
            return "sum of rewards"
        if self.function is not None:
            return "reward function"
        return "reward model" if self.url is None else "reward server"

    @property
    def gpu(self) -> int | None:
        """The number in `gpu:N`; None for another placement."""
        kind, _, number = self.placement.partition(":")
        valid = kind == "gpu" and number.isascii() and number.isdecimal()
        return int(number) if valid else None

    @property
    def device(self) -> str | None:
        """The reward model's device as torch names it; None if each process has one on its own."""
        if self.placement == "shared":
            return None
        return "cpu" if self.gpu is None else f"cuda:{self.gpu}"


class RolloutEngineName(Enum):
    """Who samples responses."""

    native = "native"
    vllm = "vllm"


class RolloutDtype(Enum):
    """Number formats of vLLM's weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


VLLM_PYTHON = "RLHF_EXP_VLLM_PYTHON"
"""Environment variable with vLLM's interpreter."""


@dataclass
class GenerationConfig:
    """Sampling of responses."""

    max_new_tokens: int = setting(48, "Longest response in tokens.")
    temperature: float = setting(1.0, "Sampling temperature, also of the log-probabilities.")
    batch: int = setting(64, "Rows decoded together in a process.", key=False)
    engine: RolloutEngineName = setting(
        RolloutEngineName.native,
        "Who samples: this project's own sampler, or vLLM (docs/how-to/vllm.md).",
        neutral=RolloutEngineName.native,
    )
    python: str | None = setting(
        None,
        "vLLM's interpreter; null: that of the environment variable RLHF_EXP_VLLM_PYTHON, or the "
        "one that runs.",
        key=False,
    )
    dtype: RolloutDtype | None = setting(
        None,
        "Number format of vLLM's weights; null: bfloat16 where `distributed.precision` or "
        "`model.dtype` is, else float32.",
        neutral=None,
    )
    placement: str = setting(
        "shared",
        "Where vLLM is: `shared` (each process has one on its own device; there it sleeps while "
        "the policy trains), `gpu:6-7` (one on each of these GPUs, for all processes) or `cpu`.",
        key=False,
    )
    urls: list[str] = setting(
        factory=list,
        doc="Addresses of vLLM servers on other machines, which share the rows: "
        "`[http://node7:8500]`, started by `rlhf-exp vllm-server`.",
        key=False,
    )

    @property
    def gpus(self) -> list[int] | None:
        """The numbers in `gpu:2`, `gpu:6-7` or `gpu:1,6-7`; `None` for another placement."""
        if re.fullmatch(r"gpu:\d+(-\d+)?(,\d+(-\d+)?)*", self.placement, re.ASCII) is None:
            return None
        found: list[int] = []
        for part in self.placement.removeprefix("gpu:").split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
        return found or None

    @property
    def interpreter(self) -> str:
        """The interpreter of vLLM."""
        return self.python or os.environ.get(VLLM_PYTHON) or sys.executable


CORRECTION_AUTO, CORRECTION_LIMIT = "auto", 2.0
"""`ppo.generation.correction=auto`, and the largest weight that it then stands for."""


@dataclass
class PpoGenerationConfig(GenerationConfig):
    """Sampling of the responses that PPO learns from."""

    correction: str | None = setting(
        CORRECTION_AUTO,
        "Largest importance weight, by which advantages make up for a sampler whose probabilities "
        "are not quite the policy's; `auto`: 2, but none where both compute in float32 with the "
        "same weights; null: none. See docs/how-to/algorithms.md.",
        neutral=CORRECTION_AUTO,
    )
    ahead: int = setting(
        0,
        "1: sample the next iteration while this one trains, from the weights before its updates; "
        "0: from those after them. See docs/how-to/algorithms.md.",
        neutral=0,
    )

    @property
    def correction_limit(self) -> float | None:
        """The number in `correction`; `None` for another value."""
        if self.correction in (None, CORRECTION_AUTO):
            return None
        try:
            return float(self.correction)
        except ValueError:
            return None


class DpoLoss(Enum):
    """DPO's losses: Rafailov et al. 2023, Azar et al. 2023 (IPO), Zhao et al. 2023 (SLiC)."""

    sigmoid = "sigmoid"
    ipo = "ipo"
    hinge = "hinge"


@dataclass
class DpoConfig(TrainingConfig):
    """Direct preference optimisation (Rafailov et al. 2023)."""

    steps: int | None = setting(None, "Optimizer steps; null: as `epochs` says.")
    epochs: float | None = setting(1.0, "Passes over the pairs, where `steps` is null.")
    seq_length: int = setting(256, "Longest sequence in tokens; longer prompts lose their start.")
    part: str | None = setting(
        None, "Train on one part of the pairs, chosen by prompt, such as 1/2; null: on all."
    )
    packing: bool = setting(
        False,
        "Put several responses with their prompts into one row of `seq_length` tokens; a "
        "micro-batch then has more pairs in as many rows.",
        key=False,
    )
    beta: float = setting(0.1, "Strength of the pull to the SFT policy, per nat.")
    loss: DpoLoss = setting(DpoLoss.sigmoid, "The loss of a pair.")
    label_smoothing: float = setting(
        0.0, "Probability that a preference is the wrong way round; of `loss=sigmoid`."
    )
    length_normalised: bool = setting(
        False, "Take means over a response's tokens instead of sums of log-probabilities."
    )
    eval_prompts: int = setting(
        100, "Validation prompts answered at each evaluation, for the KL to SFT; 0: none."
    )
    generation: GenerationConfig = setting(factory=GenerationConfig, doc="Sampling of answers.")


@dataclass
class PpoConfig(TrainingConfig):
    """Proximal policy optimisation (Schulman et al. 2017; Ziegler et al. 2019)."""

    steps: int = setting(1000, "Optimizer steps; whole iterations are run.")
    rollouts: int = setting(128, "Responses sampled per iteration, over all processes.")
    samples_per_prompt: int = setting(
        1, "Responses sampled for each prompt; divides `rollouts`.", neutral=1
    )
    epochs: int = setting(4, "Passes over an iteration's rollouts.")
    seq_length: int = setting(256, "Longest prompt and response together, in tokens.")
    advantage: AdvantageEstimator = setting(
        AdvantageEstimator.gae,
        "Estimator of advantages; all but `gae` do without a value function. See "
        "docs/how-to/algorithms.md.",
        neutral=AdvantageEstimator.gae,
    )
    grpo_scale: GroupScale = setting(
        GroupScale.std, "What GRPO divides a group's rewards by.", neutral=GroupScale.std
    )
    loss_mean: LossMean = setting(
        LossMean.tokens, "The policy's loss is a mean of these.", neutral=LossMean.tokens
    )
    gamma: float = setting(1.0, "Discount per token.")
    lam: float = setting(0.95, "Lambda of generalised advantage estimation.")
    clip_range: float = setting(0.2, "Clip range of the probability ratio.")
    clip_range_value: float = setting(0.2, "Clip range of the value function.")
    vf_coef: float = setting(1.0, "Weight of the value loss.")
    entropy_coef: float = setting(0.0, "Weight of the entropy bonus.")
    value_init: ValueInit = setting(ValueInit.small, "Initial value head.")
    value_trunk: ValueTrunk = setting(
        ValueTrunk.shared,
        "What the value head reads: the policy's states, a copy of its training blocks, a model.",
    )
    kl: KlConfig = setting(factory=KlConfig, doc="KL penalty.")
    reward: PpoRewardConfig = setting(factory=PpoRewardConfig, doc="From scores to rewards.")
    generation: PpoGenerationConfig = setting(factory=PpoGenerationConfig, doc="Sampling.")
    eval_prompts: int = setting(100, "Validation prompts answered at each evaluation.")
    select_by: SelectBy = setting(
        SelectBy.reward,
        "`select=best` takes the most reward, or the most wins over the initial policy's answers "
        "(within `kl.budget`, without a penalty).",
        neutral=SelectBy.reward,
    )
    keep_state: bool = setting(
        False,
        "The result also holds the last checkpoint, so that a longer run can go on from it.",
        key=False,
    )
    continue_from: str | None = setting(
        None,
        "Extend this finished run, made with `keep_state`, to `steps` steps in all; see "
        "docs/how-to/resume.md.",
        neutral=None,
    )

    @property
    def uses_values(self) -> bool:
        """Whether there is a value function."""
        return self.advantage is AdvantageEstimator.gae

    @property
    def prompts(self) -> int:
        """Prompts of one iteration."""
        return self.rollouts // self.samples_per_prompt

    @property
    def updates(self) -> int:
        """Optimizer steps of one iteration; the last one of an epoch may have fewer rollouts."""
        return -(-self.rollouts // self.batch) * self.epochs

    @property
    def iterations(self) -> int:
        """Iterations of a whole run: enough for `steps` optimizer steps."""
        return -(-self.steps // self.updates)


@dataclass
class BestOfConfig:
    """The best of n answers of the SFT policy, as demonstrations; sampled as PPO's are."""

    n: int = setting(16, "Answers to a prompt, of which the reward picks the best.")
    prompts: int | None = setting(
        None, "Most training prompts, the first ones; null: all. Validation prompts come on top."
    )
    seed: int = setting(0, "Seed of sampling.")
