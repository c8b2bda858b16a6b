"""Every causal family of transformers, built tiny and compared: see docs/reference/models.md.

    python -m tests.models.families              # all of them: the table anew, half an hour
    python -m tests.models.families gemma2 rwkv  # the lines of some

A family is built from its own config with small numbers, with weights so large that its logits
differ, and with windows far below the rows' lengths. Each feature is judged by what the package
says at load (`stages/model_check.py`) and, apart from that, by a comparison made here with
`model(...)`: other rows, other lengths, NumPy. `right`: accepted, and equal within 1e-3 nats.
`wrong`: accepted, but different. `refused` needs no explanation but the reason.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf_exp.batch import Demonstrations, Prompts
from rlhf_exp.models.lora import LoraSettings, lora_layers
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import load_causal_lm
from rlhf_exp.rollout.decoder import CacheKind
from rlhf_exp.rollout.sampler import SamplingParams, sample
from rlhf_exp.stages.model_check import WHOLE, ModelUse, StageUse, check_model

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

LAYERS, VOCABULARY, WINDOW = 4, 97, 8
MOST_PARAMETERS = 7_000_000
TOLERANCE = 1e-3
SIZES: tuple[tuple[int, str], ...] = (
    (VOCABULARY, "vocab_size vocab_size_per_layer_input"),
    (LAYERS, "num_hidden_layers n_layer num_layers n_layers decoder_layers num_decoder_layers"),
    (
        256,
        "n_positions n_ctx max_position_embeddings context_length max_seq_len seq_length "
        "max_target_positions max_sequence_length",
    ),
    (
        64,
        "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff n_inner ffn_hidden_size "
        "dff dim_ff feed_forward_size intermediate_size_mlp block_ff_dim",
    ),
    (
        32,
        "hidden_size d_model n_embd dim attention_hidden_size moe_intermediate_size "
        "shared_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size lru_width conv_dim encoder_hidden_size embedding_size "
        "embedding_dim hidden_dim",
    ),
    (16, "q_lora_rank kv_lora_rank qk_head_dim index_head_dim"),
    (
        WINDOW,
        "sliding_window window_size attention_chunk_size attention_window_size swa_window window",
    ),
    (
        8,
        "head_dim attention_head_dim kv_channels qk_nope_head_dim qk_rope_head_dim v_head_dim "
        "state_size mamba_d_state ssm_state_size mamba_n_heads mamba_d_head mamba_num_heads "
        "mamba_head_dim chunk_size mamba_chunk_size linear_key_head_dim linear_value_head_dim "
        "hidden_size_per_layer_input index_topk rotary_dim mamba_headdim",
    ),
    (
        4,
        "num_attention_heads n_head num_heads n_heads decoder_attention_heads "
        "encoder_attention_heads attention_heads num_experts n_routed_experts num_local_experts "
        "moe_num_experts time_step_rank mamba_dt_rank linear_num_value_heads "
        "num_decoder_attention_heads num_encoder_attention_heads",
    ),
    (
        2,
        "num_key_value_heads n_head_kv num_kv_heads encoder_layers num_encoder_layers "
        "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts "
        "n_mamba_heads linear_num_key_heads index_n_heads",
    ),
    (
        1,
        "n_shared_experts moe_num_shared_experts num_shared_experts n_group topk_group "
        "num_expert_group num_limited_groups mamba_n_groups n_groups mamba_ngroups "
        "first_k_dense_replace moe_layer_start_index bos_token_id eos_token_id pad_token_id",
    ),
    (0, "num_kv_shared_layers"),
)
SMALL = {name: size for size, names in SIZES for name in names.split()}
"""The size of a tiny model for each name that a config has for it."""

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
    "factor": 16.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    kind: (kind, {}) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
}
"""What is built, by its name in the table: the family, and values of its config."""
KINDS |= {
    "phi3, longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 16},
    ),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
}

CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
LATENT = {"num_key_value_heads": 4, "head_dim": 8, "qk_head_dim": 16}
OVERRIDES: dict[str, dict[str, Any]] = {
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    **dict.fromkeys(
        (
            *("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32"),
            *("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"),
        ),
        LATENT,
    ),
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "whisper": {"decoder_attention_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "mamba2": {"hidden_size": 32, "expand": 2, "num_heads": 8, "head_dim": 8},
}
"""Values that a family needs beside `SMALL`, by its name in transformers."""

FEATURES = ("rows", "packing", "slots", "library", "train_blocks", "lora", "checkpointing")
OPTIONS = {
    "rows": WHOLE,
    "packing": "sft.packing",
    "slots": "model.cache",
    "library": "model.cache",
    "train_blocks": "sft.train_blocks",
    "lora": "sft.lora.rank",
    "checkpointing": "sft.gradient_checkpointing",
}
"""The option by which `check_model` refuses each feature."""

LORA = LoraSettings(rank=2, alpha=4.0)
Rows = list[Tensor]


def tiny_config(name: str) -> PreTrainedConfig:
    """Return the config of a tiny model, with layers of every kind that the family has."""
    kind, values = KINDS[name]
    config_class = CONFIG_MAPPING[kind]
    whole = config_class()
    text = whole.get_text_config(decoder=True)
    fields = {**_small_fields(text), **OVERRIDES.get(kind, {}), **values}
    if text is whole:
        return config_class(**fields)
    for section in ("text_config", "decoder"):
        if type(getattr(whole, section, None)) is type(text):
            return config_class(**{section: {**fields, "model_type": text.model_type}})
    return config_class(**fields, is_encoder_decoder=False)


def _small_fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    settable = vars(config).keys() | type(config).attribute_map.keys()
    for name, size in SMALL.items():
        if name in settable and isinstance(getattr(config, name, None), int | float):
            fields[name] = size
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[name] = 1
    if hasattr(config, "is_decoder"):
        fields["is_decoder"] = True
    total = getattr(config, "num_hidden_layers", None)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == total and not name.startswith("_"):
            first = [value[index] for index in range(total) if value.index(value[index]) == index]
            fields[name] = (first + value)[:LAYERS] if len(first) < LAYERS else first[:LAYERS]
    return fields


def tiny_model(name: str) -> PreTrainedModel:
    """Return a random model of a family, with logits far apart.

    Raises:
        ValueError: it cannot be made small.
    """
    config = tiny_config(name)
    with torch.device("meta"):
        size = AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.std() > 0:
                # Outputs about as large as inputs, whatever the width.
                parameter.mul_(1.5 * parameter.shape[-1] ** -0.5 / parameter.std())
        model.get_output_embeddings().weight.mul_(2.0)
    return model.eval()


@dataclass
class Line:
    """What came of one family.

    Attributes:
        name: the family.
        cells: by feature, `right`, `refused`, `wrong`, or `right, refused` for what is refused
            although it would be right.
        reason: why something is refused, or the family is left out.
    """

    name: str
    cells: dict[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def built(self) -> bool:
        """Whether a tiny model of the family runs at all."""
        return bool(self.cells)


def judge(name: str) -> Line:
    """Build a family, and compare every feature."""
    try:
        model = tiny_model(name)
        rows = random_rows((37, 13, 24))
        with torch.no_grad():
            logits = model(input_ids=rows[0][None]).logits
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("logits are not finite")
    except Exception as error:  # a family that cannot be built tiny is said to be so
        return Line(name, reason=f"not built: {_first_line(error)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
            AutoModelForCausalLM.from_pretrained(folder)
        except Exception as error:
            return Line(name, reason=f"transformers cannot save it: {_first_line(error)}")
        return _judge(name, folder)


def _judge(name: str, folder: str) -> Line:
    refusals = _refusals(folder)
    comparisons: dict[str, Callable[[str], float]] = {
        "rows": rows_difference,
        "packing": packing_difference,
        "slots": lambda path: sampling_difference(path, "slots"),
        "library": lambda path: sampling_difference(path, "library"),
        "train_blocks": lambda path: rows_difference(path, train_blocks=2),
        "lora": adapter_difference,
        "checkpointing": lambda path: rows_difference(path, checkpointing=True),
    }
    line = Line(name)
    for feature in FEATURES:
        refusal = refusals.get(feature) or refusals.get("rows")
        try:
            difference = comparisons[feature](folder)
            right = difference <= TOLERANCE
        except Exception:  # whatever it raises, it is not right
            right = False
        line.cells[feature] = ("refused" if refusal else "right") if right else "wrong"
        if refusal:
            line.cells[feature] = "right, refused" if right else "refused"
            line.reason = line.reason or refusal
    return line


def _refusals(folder: str) -> dict[str, str]:
    """Return what the package says of each feature that it refuses."""
    stage = StageUse("sft", packing=True, checkpointing=True, train_blocks=2)
    adapter = StageUse("sft", lora=LORA)
    found: dict[str, str] = {}
    for cache, stages in (("slots", (stage, adapter)), ("library", ())):
        kind: CacheKind = "slots" if cache == "slots" else "library"
        problems = dict(check_model(folder, None, ModelUse(stages, kind)))
        for feature in FEATURES:
            if feature in ("slots", "library") and feature != cache:
                continue
            if OPTIONS[feature] in problems:
                found[feature] = problems[OPTIONS[feature]]
    return found


def random_rows(lengths: tuple[int, ...]) -> Rows:
    """Return rows of random tokens."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def own_table(model: PreTrainedModel, row: Tensor, temperature: float = 1.0) -> np.ndarray:
    """Return log-probabilities [S, V] of a row alone by `model(...)`, in float64."""
    with torch.no_grad():
        logits = model.eval()(input_ids=row[None]).logits[0].double().numpy() / temperature
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def own_targets(model: PreTrainedModel, row: Tensor, temperature: float = 1.0) -> np.ndarray:
    """Return the log-probability of each token but the first, float64."""
    table = own_table(model, row, temperature)
    return table[np.arange(len(row) - 1), row[1:].numpy()]


def rows_difference(
    folder: str, train_blocks: int | None = None, checkpointing: bool = False
) -> float:
    """Compare right-padded rows, as PPO and as SFT run them, and the gradient of SFT's loss."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    policy = Policy(load_causal_lm(folder), train_blocks, value_head=False).train()
    policy.set_gradient_checkpointing(checkpointing)
    return _rows_difference(whole, policy)


def _rows_difference(whole: PreTrainedModel, policy: Policy) -> float:
    rows, prompts = random_rows((37, 13, 24)), (20, 2, 7)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=5)
    lengths = torch.tensor([len(row) for row in rows])
    starts = torch.tensor(prompts)
    outputs = policy.response_outputs(tokens, starts, lengths - starts, 1.3)
    worst = 0.0
    for number, row in enumerate(rows):
        expected = own_targets(whole, row, 1.3)[prompts[number] - 1 :]
        found = outputs.logprobs[number, : len(expected)].detach().double().numpy()
        worst = max(worst, float(np.abs(found - expected).max()))
    columns = torch.arange(tokens.shape[1]).expand_as(tokens)
    real = columns < lengths[:, None]
    loss = policy(Demonstrations(tokens, columns, real.long(), real & (columns > 0)))
    expected = np.concatenate([own_targets(whole, row) for row in rows])
    worst = max(worst, float(np.abs(loss.detach().double().numpy() - expected).max()))
    return max(worst, _gradient_difference(whole, policy, loss, rows))


def _gradient_difference(
    whole: PreTrainedModel, policy: Policy, logprobs: Tensor, rows: Rows
) -> float:
    """Return the relative difference of the mean log-probability's gradient, in tenths."""
    ours = dict(policy.model.named_parameters())
    names = [name for name, value in ours.items() if value.requires_grad]
    if lora_layers(policy.model):
        return 0.0  # the adapter's own parameters have no counterpart in the whole model
    # The package lets the padding token's embedding learn, which some families do not.
    whole.get_input_embeddings().padding_idx = None
    found = torch.autograd.grad(logprobs.mean(), [ours[name] for name in names], allow_unused=True)
    theirs = dict(whole.named_parameters())
    count = sum(len(row) - 1 for row in rows)
    mean = torch.stack(
        [
            whole(input_ids=row[None]).logits[0, :-1].log_softmax(-1).gather(1, row[1:, None]).sum()
            for row in rows
        ]
    ).sum()
    expected = torch.autograd.grad(
        mean / count, [theirs[name] for name in names], allow_unused=True
    )
    pairs = [
        (a if a is not None else torch.zeros(()), b if b is not None else torch.zeros(()))
        for a, b in zip(found, expected, strict=True)
    ]
    error = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    size = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
    return 0.1 * error / max(size, 1e-6)


def packing_difference(folder: str) -> float:
    """Compare rows that are packed into one."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    policy = Policy(load_causal_lm(folder), value_head=False).train()
    rows = random_rows((21, 30, 5, 11))
    batch = Demonstrations(
        torch.cat(rows)[None],
        torch.cat([torch.arange(len(row)) for row in rows])[None],
        torch.cat([torch.full_like(row, number) for number, row in enumerate(rows, 1)])[None],
        torch.cat([torch.arange(len(row)) > 0 for row in rows])[None],
    )
    expected = np.concatenate([own_targets(whole, row) for row in rows])
    return float(np.abs(policy(batch).detach().double().numpy() - expected).max())


def sampling_difference(folder: str, cache: CacheKind) -> float:
    """Compare the log-probabilities of sampled answers to prompts of unequal length."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    prompts = random_rows((19, 4, 11, 1))
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=5)
    numbers = torch.arange(len(prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    settings = SamplingParams(21, 1.3, batch=3, eos_id=-1, pad_id=5, cache=cache)
    samples = sample(
        load_causal_lm(folder), Prompts(tokens, lengths, numbers, numbers), settings, seed=3
    )
    worst = 0.0
    for number, prompt in enumerate(prompts):
        row = samples.tokens[number, : len(prompt) + 21]
        expected = own_targets(whole, row, 1.3)[len(prompt) - 1 :]
        found = samples.logprobs[number].double().numpy()
        worst = max(worst, float(np.abs(found - expected).max()))
    return worst


def adapter_difference(folder: str) -> float:
    """Compare the adapted policy, and what it saves, with weights merged by hand."""
    whole = AutoModelForCausalLM.from_pretrained(folder)
    policy = Policy(load_causal_lm(folder), lora=LORA, value_head=False).train()
    generator = torch.Generator().manual_seed(12)
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for name, layer in lora_layers(policy.model):
            down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            up.copy_(torch.randn(up.shape, generator=generator) * 0.2)
            update = LORA.alpha / LORA.rank * up @ down
            transposed = type(layer.base_layer).__name__ == "Conv1D"
            weights[f"{name}.weight"] += update.t() if transposed else update
    worst = _rows_difference(whole, policy)
    with tempfile.TemporaryDirectory() as target:
        policy.merged_model().save_pretrained(target)
        saved = AutoModelForCausalLM.from_pretrained(target)
    row = random_rows((31,))[0]
    return max(worst, float(np.abs(own_table(saved, row) - own_table(whole, row)).max()))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what transformers says about random models."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(level)


def table_of(page: str) -> dict[str, Line]:
    """Return the lines of a page's table, by name."""
    rows = page.partition(BEGIN)[2].partition(END)[0].splitlines()
    lines = {}
    for row in [row for row in rows if row.startswith("| ")][1:]:
        name, *cells, reason = (cell.strip() for cell in row.strip("|").split("|"))
        found = dict(zip(FEATURES, cells, strict=True)) if cells[0] else {}
        lines[name] = Line(name, found, reason)
    return lines


def written(lines: dict[str, Line]) -> str:
    """Return the table of a page, and how many families there are of each kind."""
    built = [line for line in lines.values() if line.built]
    right = [line for line in built if line.cells["rows"] == "right"]
    wrong = [line.name for line in built if "wrong" in line.cells.values()]
    head = [
        BEGIN,
        f"{len(lines)} families and variants; {len(built)} built tiny: {len(right)} right, "
        f"{len(built) - len(right)} refused as a whole; silently wrong in some feature: "
        f"{len(wrong)}{': ' + ', '.join(wrong) if wrong else ''}.",
        "",
        f"| family | {' | '.join(FEATURES)} | what is said first |",
        "|---" * (len(FEATURES) + 2) + "|",
    ]
    rows = [
        f"| {line.name} | {' | '.join(line.cells.get(name, '') for name in FEATURES)} | "
        f"{line.reason.replace('|', '/')} |"
        for _, line in sorted(lines.items())
    ]
    return "\n".join([*head, *rows, END])


def main(names: list[str]) -> None:
    """Judge families, print their lines, and put them into docs/reference/models.md."""
    page = PAGE.read_text(encoding="utf-8")
    lines = {name: line for name, line in table_of(page).items() if name in KINDS}
    with quiet():
        for name in names or list(KINDS):
            lines[name] = line = judge(name)
            print(f"{name}: {line.cells} {line.reason}", flush=True)
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + written(lines) + after, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
