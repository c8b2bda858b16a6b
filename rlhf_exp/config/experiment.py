"""The root of the config, `Config`, and the sections that describe model, data and machine.

The sections of stages and studies are in modules of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from rlhf_exp.config.evaluation import EvalConfig
from rlhf_exp.config.fields import setting
from rlhf_exp.config.study import StudyConfig
from rlhf_exp.config.training import BestOfConfig, DpoConfig, PpoConfig, RewardConfig, SftConfig


class StageName(Enum):
    """Stages, and `pipeline` for all of them."""

    sft = "sft"
    reward = "reward"
    dpo = "dpo"
    best_of = "best_of"
    ppo = "ppo"
    eval = "eval"
    pipeline = "pipeline"


STAGES = tuple(stage.name for stage in StageName if stage is not StageName.pipeline)
"""All stages, in the order in which they run."""
UNTRAINED = ("best_of", "eval")
"""Stages that train no model, so that none can be given in their place."""


class CachePolicy(Enum):
    """What happens to a result in the store whose code has changed since."""

    strict = "strict"
    trust = "trust"


class DataSource(Enum):
    """Kinds of data sources."""

    toy = "toy"
    arithmetic = "arithmetic"
    hub = "hub"
    jsonl = "jsonl"


class PromptFormat(Enum):
    """How a dialogue becomes text."""

    hh = "hh"
    chat_template = "chat_template"
    plain = "plain"


@dataclass
class ToyConfig:
    """Sizes of the bundled dialogues."""

    seed: int = setting(0, "Seed of the generator.")
    demonstrations: int = setting(4000, "Demonstrations for SFT.")
    preferences: int = setting(4000, "Preference pairs.")
    prompts: int = setting(3000, "Prompts for PPO.")
    validation: int = setting(200, "Validation rows of each kind.")
    test: int = setting(200, "Test rows of each kind.")
    label_noise: float = setting(0.12, "Fraction of preference labels that are flipped.")


CHOSEN, CHOSEN_FILE = "demonstrations", "chosen.jsonl"
"""Role and file of the answers that `stage=best_of` has chosen."""
BEST_OF_RUN = "best_of:"


@dataclass
class ColumnsConfig:
    """The files' own columns, where no known layout has their names; all null: a known layout."""

    prompt: str | None = setting(None, "Column of the prompt: text, or messages.", neutral=None)
    response: str | None = setting(None, "Column of the response to imitate.", neutral=None)
    chosen: str | None = setting(None, "Column of the preferred response.", neutral=None)
    rejected: str | None = setting(None, "Column of the other response.", neutral=None)
    messages: str | None = setting(None, "Column of a dialogue in messages.", neutral=None)
    text: str | None = setting(None, "Column of a dialogue in marked text.", neutral=None)
    rating: str | None = setting(
        None, "Column of the response's rating: a number, higher is better.", neutral=None
    )
    label: str | None = setting(
        None, "Column of the response's label: true (good) or false.", neutral=None
    )
    system: str | None = setting(
        None, "Column of a text that becomes the prompt's system turn.", neutral=None
    )


@dataclass
class ArithmeticConfig:
    """Sizes of the bundled sums."""

    seed: int = setting(0, "Seed of the generator.")
    demonstrations: int = setting(6000, "Demonstrations for SFT.")
    preferences: int = setting(4000, "Preference pairs.")
    prompts: int = setting(3000, "Prompts for PPO.")
    validation: int = setting(200, "Validation rows of each kind.")
    test: int = setting(500, "Test rows of each kind.")
    numbers: int = setting(4, "Numbers in a sum.")
    right: float = setting(0.5, "Expected share of the demonstrations that are right.")


@dataclass
class DataConfig:
    """Sources, splits and the prompt format."""

    source: DataSource = setting(DataSource.toy, "Kind of source.")
    path: str | None = setting(None, "Hub id, or folder of a data set, of a `hub` source.")
    revision: str | None = setting(None, "Revision of the hub id.")
    preferences: str | None = setting(
        None, "File of preference pairs: JSONL, JSON, CSV, Parquet.", key=False
    )
    demonstrations: str | None = setting(
        None,
        "File of demonstrations, or best_of:RUN for the answers that a run of stage=best_of has "
        "chosen; null: prompt and chosen answer.",
        key=False,
    )
    prompts: str | None = setting(
        None, "File of prompts; null: those of all other rows.", key=False
    )
    test: str | None = setting(
        None, "File of held-out pairs; null: split off by prompt.", key=False
    )
    columns: ColumnsConfig = setting(factory=ColumnsConfig, doc="The files' own columns.")
    reader: str | None = setting(
        None,
        "A Python function that reads these files: `file.py:name` or `package.module:name`, see "
        "docs/how-to/data.md.",
        key=False,
    )
    format: PromptFormat = setting(PromptFormat.hh, "How a dialogue becomes text.")
    toy: ToyConfig = setting(factory=ToyConfig, doc="Sizes of the bundled dialogues.")
    arithmetic: ArithmeticConfig = setting(
        factory=ArithmeticConfig, doc="Sizes of the bundled sums."
    )
    validation_fraction: float = setting(0.05, "Share of prompts split off for validation.")
    test_fraction: float = setting(0.05, "Share of prompts split off for test, if no test file.")
    limit: int | None = setting(None, "Use at most this many rows of each file.")
    max_bad_fraction: float = setting(
        0.05, "Stop when more than this share of rows cannot be used.", key=False
    )

    @property
    def chosen_by(self) -> str | None:
        """The run whose chosen answers are the demonstrations, if `demonstrations` names one."""
        text = self.demonstrations or ""
        return text.removeprefix(BEST_OF_RUN) if text.startswith(BEST_OF_RUN) else None


class Family(Enum):
    """Decoder families that can be built from scratch and planned without loading."""

    gpt2 = "gpt2"
    gptj = "gptj"
    gpt_neox = "gpt_neox"
    llama = "llama"
    qwen2 = "qwen2"


class Dtype(Enum):
    """Number formats of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class PrecisionName(Enum):
    """Number formats of forward and backward passes; `auto` is one of the others, once planned."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    auto = "auto"


class Attention(Enum):
    """Attention implementations of transformers."""

    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class CacheName(Enum):
    """Who keeps what earlier tokens leave behind, while answers are sampled."""

    slots = "slots"
    library = "library"


@dataclass
class ArchitectureConfig:
    """The model's shape: builds `tiny`, and lets `plan` estimate any model with no network."""

    type: Family = setting(Family.gpt_neox, "Decoder family.")
    layers: int = setting(4, "Number of blocks.")
    width: int = setting(128, "Hidden width.")
    heads: int = setting(4, "Attention heads.")
    kv_heads: int | None = setting(None, "Key-value heads; null: as many as `heads`.")
    ffn_width: int | None = setting(None, "Feed-forward width; null: four times `width`.")
    vocabulary: int = setting(1024, "Vocabulary size; for a model from scratch, its tokenizer's.")
    context: int = setting(256, "Longest sequence in tokens.")
    tied: bool = setting(False, "Whether input and output embeddings are one matrix.")


@dataclass
class ModelConfig:
    """The model that SFT starts from."""

    name: str = setting("tiny", "Label in tables and reports.", key=False)
    path: str | None = setting(None, "Hub id or folder; null: built from scratch.")
    revision: str | None = setting(None, "Revision of a hub id.")
    dtype: Dtype = setting(Dtype.float32, "Number format of the weights in memory.")
    attention: Attention = setting(Attention.sdpa, "Attention implementation.", key=False)
    cache: CacheName = setting(
        CacheName.slots,
        "Cache that sampling uses: `slots` (fast: rows of any length), or `library` (the model's "
        "own, rows in lockstep: for families whose blocks keep a state, and others that `slots` "
        "cannot decode).",
        neutral=CacheName.slots,
    )
    architecture: ArchitectureConfig = setting(
        factory=ArchitectureConfig, doc="Shape; checked against the real config on load."
    )
    seed: int = setting(0, "Seed of a model from scratch.")


class EngineName(Enum):
    """Who trains: `native` (ours), or a library: `trlx` PPO; `trl` RLOO, GRPO and DPO."""

    native = "native"
    trlx = "trlx"
    trl = "trl"

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this engine does in place of the native one."""
        return {"native": (), "trlx": ("ppo",), "trl": ("ppo", "dpo")}[self.name]


@dataclass
class EngineConfig:
    """Who trains PPO and DPO; SFT, the reward model and evaluations are native."""

    name: EngineName = setting(
        EngineName.native,
        "Who trains: `native` (ours), or a library: `trlx` (PPO) or `trl` (RLOO, GRPO and DPO).",
    )
    python: str | None = setting(
        None,
        "Interpreter that has the library; docs/how-to/trlx.md and docs/how-to/trl.md say how to "
        "make one.",
        key=False,
    )


class StrategyName(Enum):
    """How parameters, gradients and optimizer state are spread over processes."""

    single = "single"
    ddp = "ddp"
    zero1 = "zero1"
    zero2 = "zero2"
    zero3 = "zero3"
    fsdp = "fsdp"


class ShardOver(Enum):
    """Processes over which FSDP divides one copy of the weights.

    `node`: those of a machine. Each machine then has a copy, so only gradients travel between them.
    """

    all = "all"
    node = "node"


@dataclass
class DistributedConfig:
    """Strategy and processes."""

    strategy: StrategyName = setting(
        StrategyName.single, "Data-parallel or sharding strategy.", key=False
    )
    processes: int = setting(1, "Processes over all nodes, one per device.", key=False)
    threads: int | None = setting(
        None, "CPU threads of a process; null: cores / processes.", key=False
    )
    precision: PrecisionName = setting(
        PrecisionName.float32,
        "Precision of forward and backward passes; `auto`: bfloat16 where half a second's "
        "measurement finds it 1.5 times as fast as float32, and on GPUs that have it.",
    )
    offload: bool = setting(
        False,
        "Keep the optimizer's state in host memory; zero3 and fsdp: the parameters too.",
        key=False,
    )
    shard_over: ShardOver = setting(
        ShardOver.all,
        "Processes that fsdp divides the weights over; node: those of a machine, each with a copy.",
        key=False,
    )


class TrackingMode(Enum):
    """Modes of Weights & Biases."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


class FurtherTracker(Enum):
    """Trackers besides W&B."""

    tensorboard = "tensorboard"


@dataclass
class AlertsConfig:
    """When PPO raises an alert, at W&B and in `alerts.jsonl`; training goes on."""

    kl_factor: float | None = setting(
        3.0, "`kl/sequence` above so many times `ppo.kl.target`; null: never.", key=False
    )
    reward_drop: float | None = setting(
        1.0,
        "`reward/mean` over five iterations so many standard deviations of the scores below its "
        "best; null: never.",
        key=False,
    )
    entropy_fraction: float | None = setting(
        0.2,
        "`policy/entropy` below this fraction of the first iteration's; null: never.",
        key=False,
    )


@dataclass
class TrackingConfig:
    """Weights & Biases; the local metrics.jsonl is always written."""

    mode: TrackingMode = setting(TrackingMode.offline, "Where W&B records.", key=False)
    project: str = setting("rlhf-exp", "W&B project.", key=False)
    entity: str | None = setting(None, "W&B user or team; null: your default.", key=False)
    tags: list[str] = setting(factory=list, doc="W&B tags.", key=False)
    also: list[FurtherTracker] = setting(
        factory=list, doc="Further trackers, whatever the mode: tensorboard.", key=False
    )
    alerts: AlertsConfig = setting(factory=AlertsConfig, key=False)


@dataclass
class Config:
    """One experiment."""

    stage: StageName = setting(StageName.pipeline, "What to bring up to date.", key=False)
    name: str | None = setting(None, "Name of the run or multirun in reports.", key=False)
    seed: int = setting(0, "Seed of every stage that sets none of its own.", key=False)
    plan: bool = setting(False, "Print what would run, and stop.", key=False)
    probe: bool = setting(False, "Run two full-size iterations and report.", key=False)
    cache: CachePolicy = setting(
        CachePolicy.strict, "`trust`: reuse results although the code has changed.", key=False
    )
    rerun: list[str] = setting(
        factory=list, doc="Stages to run again although the store has their results.", key=False
    )
    output_dir: str = setting("outputs", "Folder of the store, reports and run records.", key=False)
    model: ModelConfig = setting(factory=ModelConfig)
    data: DataConfig = setting(factory=DataConfig)
    sft: SftConfig = setting(factory=SftConfig)
    reward: RewardConfig = setting(factory=RewardConfig)
    dpo: DpoConfig = setting(factory=DpoConfig)
    best_of: BestOfConfig = setting(factory=BestOfConfig)
    ppo: PpoConfig = setting(factory=PpoConfig)
    engine: EngineConfig = setting(factory=EngineConfig)
    distributed: DistributedConfig = setting(factory=DistributedConfig)
    eval: EvalConfig = setting(factory=EvalConfig)
    tracking: TrackingConfig = setting(factory=TrackingConfig)
    study: StudyConfig = setting(factory=StudyConfig)

    @property
    def computes_in(self) -> Dtype:
        """Number format of forward and backward passes: half precision if weights have it."""
        precision = self.distributed.precision
        assert precision is not PrecisionName.auto, "it is chosen before anything is planned"
        half = precision is PrecisionName.bfloat16 or self.model.dtype is Dtype.bfloat16
        return Dtype.bfloat16 if half else Dtype.float32
