"""The card of an exported model: what a stranger needs to use it, and to know how far to trust it.

It names no folder of the machine that trained: data and models that were files go by their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf_exp import __version__
from rlhf_exp.config.experiment import BEST_OF_RUN, UNTRAINED
from rlhf_exp.data.rows import Turn
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.evaluation.comparison import ModelComparison
from rlhf_exp.evaluation.preference import DASH
from rlhf_exp.model_names import split_revision
from rlhf_exp.models.pretrained import end_token_ids, load_tokenizer
from rlhf_exp.report.run.gather import gather
from rlhf_exp.report.run.page import comparisons_of, headlines_of
from rlhf_exp.report.run.verdict import marked_rows
from rlhf_exp.store.artifact import Artifact

ALGORITHMS = {"gae": "PPO", "rloo": "RLOO", "grpo": "GRPO", "reinforce_pp": "REINFORCE++"}
"""Names of `ppo.advantage`."""
_SAMPLE = "How do I boil an egg?"
_PLACEHOLDER = "FOLDER_OR_HUB_ID"


def model_card(
    artifact: Artifact,
    chain: Mapping[str, Artifact],
    name: str,
    repository: str | None = None,
    step: int | None = None,
) -> str:
    """Return the card as Markdown with the hub's metadata.

    Args:
        artifact: The model's artifact.
        chain: The artifacts of the run, by stage, in the order they run.
        name: The run's name.
        repository: Its hub id, if it is pushed to the hub.
        step: Optimizer step of the snapshot that is exported; `None`: the published model.
    """
    config = artifact.manifest.config
    codec = Codec(
        load_tokenizer(artifact.path / "model"),
        config["data"]["format"],
        end_token_ids(artifact.path / "model"),
    )
    used = {stage: made for stage, made in chain.items() if stage not in UNTRAINED}
    base, tuned = _origins(artifact, used)
    parts = [
        f"---\n{yaml.safe_dump(_metadata(artifact, base), sort_keys=False)}---",
        f"# {repository or f'{name}, {artifact.stage.upper()}'}",
        _summary(artifact, base, tuned),
        "## Use",
        _usage(codec, config, repository or _PLACEHOLDER),
        "## Prompt format",
        _prompt_format(codec, config),
        "## Training",
        *_training(artifact, used, step),
        "## Data",
        "\n".join(_data(config, used)),
        "## Evaluation",
        "\n\n".join(_evaluation(chain, name, step)),
        "## Limits",
        "\n".join(f"- {limit}" for limit in _limits(artifact, base, chain, step)),
        "## Origin",
        "\n".join(_origin(artifact, used)),
    ]
    return "\n\n".join(parts) + "\n"


def _origins(
    artifact: Artifact, used: Mapping[str, Artifact]
) -> tuple[tuple[str | None, str | None], Mapping[str, Any] | None]:
    """Return the model that training began with, its revision, and the config of its SFT, if any.

    The SFT model may be another run's, or given: then nothing is known of how it was tuned, and
    `model.path` was not read.
    """
    made: Mapping[str, Any] = artifact.manifest.config
    given = made["sft"]["use"]
    if given is not None:
        if "sft" not in used:
            return (given, None), None
        made = used["sft"].manifest.config
    return (made["model"]["path"], made["model"]["revision"]), made


def _metadata(artifact: Artifact, base: tuple[str | None, str | None]) -> dict[str, Any]:
    config = artifact.manifest.config
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlhf", artifact.stage, "rlhf-exp"],
    }
    data = config["data"]["path"]
    if _on_hub(base[0]):
        metadata["base_model"] = split_revision(str(base[0]))[0]
    if config["data"]["source"] == "hub" and _on_hub(data):
        metadata["datasets"] = [data]
    return metadata


def _on_hub(name: str | None) -> bool:
    """Return whether a name is a hub id and no folder of this machine."""
    return bool(name) and str(name).count("/") <= 1 and not Path(str(name)).expanduser().exists()


def _public(name: object) -> str:
    """Return a hub id as it is, and of a path its last part."""
    text = str(name)
    return text if _on_hub(text) and not text.startswith((".", "~", "/")) else Path(text).name


def _base(path: str | None, revision: str | None) -> str:
    if not path:
        return "random weights, with a tokenizer trained on the same data"
    return f"`{_public(path)}`{f' (revision `{revision}`)' if revision else ''}"


def _method(artifact: Artifact, tuned: Mapping[str, Any] | None) -> str:
    config = artifact.manifest.config
    steps = []
    if tuned is not None:
        chosen = str(tuned["data"].get("demonstrations") or "").startswith(BEST_OF_RUN)
        what = "the best of several answers of a model by a reward" if chosen else "demonstrations"
        steps.append(f"supervised fine-tuning on {what}")
    if artifact.stage == "dpo":
        steps.append("DPO on preferences")
    elif artifact.stage == "ppo":
        reward = config["ppo"]["reward"]
        score = "a reward model trained on preferences"
        if reward.get("terms"):
            score = f"a weighted sum of {len(reward['terms'])} rewards"
        elif reward["function"]:
            score = f"the reward function `{_function_name(reward['function'])}`"
        elif reward["url"]:
            score = "the scores of a reward server"
        steps.append(f"{ALGORITHMS[config['ppo'].get('advantage', 'gae')]} against {score}")
    return ", then ".join(steps)


def _function_name(spec: str) -> str:
    """Return `file.py:name` without the file's folder."""
    path, _, name = spec.rpartition(":")
    return f"{Path(path).name}:{name}"


def _summary(
    artifact: Artifact, base: tuple[str | None, str | None], tuned: Mapping[str, Any] | None
) -> str:
    return f"A language model made from {_base(*base)} by {_method(artifact, tuned)}."


def _usage(codec: Codec, config: Mapping[str, Any], source: str) -> str:
    new = config["ppo"]["generation"]["max_new_tokens"]
    if codec.prompt_format == "chat_template":
        prompt = (
            f'messages = [{{"role": "user", "content": "{_SAMPLE}"}}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n'
            ")"
        )
    else:
        text = codec.render((Turn("human", _SAMPLE),))
        prompt = f'inputs = tokenizer({text!r}, return_tensors="pt")'
    stops = "" if not codec.stop_strings else f"stop_strings={list(codec.stop_strings)!r}, "
    more = f"{stops}tokenizer=tokenizer" if stops else ""
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{source}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{source}")\n'
        f"{prompt}\n"
        f"output = model.generate(\n    **inputs, do_sample=True, max_new_tokens={new}, {more}\n)\n"
        "start = inputs.input_ids.shape[1]\n"
        "print(tokenizer.decode(output[0, start:], skip_special_tokens=True))\n"
        "```"
    )


def _prompt_format(codec: Codec, config: Mapping[str, Any]) -> str:
    kinds = {
        "hh": "Turns begin with `\\n\\nHuman: ` and `\\n\\nAssistant: `; a prompt ends with "
        "`\\n\\nAssistant:`, without a space.",
        "chat_template": "The tokenizer's chat template.",
        "plain": "The plain text, to be continued; the turns of a dialogue are lines.",
    }
    lines = [kinds[codec.prompt_format], ""]
    if codec.stop_strings:
        stops = ", ".join(f"`{text}`" for text in codec.stop_strings)
        lines += [f"An answer ends at the end-of-sequence token, or before {stops}.", ""]
    lines.append(
        f"Trained with up to {config['ppo']['seq_length']} tokens of prompt and answer together, "
        f"and answers of up to {config['ppo']['generation']['max_new_tokens']}."
    )
    return "\n".join(lines)


def _training(artifact: Artifact, used: Mapping[str, Artifact], step: int | None) -> Iterator[str]:
    published = artifact.manifest.metrics.get("published_step")
    if step is not None:
        yield f"These are the weights after {step} optimizer steps, a snapshot of the run."
    elif published is not None:
        yield (
            f"These are the weights after {published:.0f} optimizer steps, "
            + (
                "the best of the run on validation data."
                if artifact.manifest.config[artifact.stage]["select"] == "best"
                else "the last of the run."
            )
        )
    rows = ["| stage | steps | learning rate | batch | trained | seed | more |"]
    rows.append("|---|---|---|---|---|---|---|")
    for stage, made in used.items():
        section = made.manifest.config[stage]
        taken = made.manifest.metrics.get("published_step")
        cells = [
            stage.upper() if stage != "reward" else "reward model",
            DASH if taken is None else f"{taken:.0f} (published)",
            f"{section['lr']:g}, {section['schedule']}",
            f"{section['batch']}",
            _trained_part(section),
            f"{section['seed']}",
            _further(stage, section),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    yield "\n".join(rows)


def _trained_part(section: Mapping[str, Any]) -> str:
    if section["lora"]["rank"]:
        return f"LoRA of rank {section['lora']['rank']}"
    blocks = section["train_blocks"]
    return "all weights" if blocks is None else f"the top {blocks} blocks"


def _further(stage: str, section: Mapping[str, Any]) -> str:
    if stage == "dpo":
        return f"beta {section['beta']:g}, loss {section['loss']}"
    if stage != "ppo":
        return ""
    kl = section["kl"]
    target = "" if kl["target"] is None else f", target {kl['target']:g} nats"
    return (
        f"KL coefficient {kl['coef']:g}{target}; {section['rollouts']} rollouts an iteration; "
        f"clip range {section['clip_range']:g}"
    )


def _data(config: Mapping[str, Any], used: Mapping[str, Artifact]) -> Iterator[str]:
    data = config["data"]
    if data["source"] == "toy":
        yield "- Generated dialogues that come with rlhf_exp, in English; not people's."
    if data["source"] == "arithmetic":
        yield "- Generated sums that come with rlhf_exp, with right and wrong answers."
    revision = f" (revision `{data['revision']}`)" if data.get("revision") else ""
    for name, label in (
        ("path", "Source"),
        ("demonstrations", "Demonstrations"),
        ("preferences", "Preferences"),
        ("prompts", "Prompts"),
    ):
        if data.get(name):
            yield f"- {label}: `{_public(data[name])}`{revision if name == 'path' else ''}"
    for stage, name, label in (
        ("sft", "rows", "demonstrations"),
        ("reward", "pairs", "preference pairs"),
        ("dpo", "pairs", "preference pairs of DPO"),
        ("ppo", "prompts", "prompts of PPO"),
    ):
        facts = used[stage].json("facts.json") if stage in used else None
        if facts and name in facts:
            yield f"- {facts[name]:,} {label}"


def _evaluation(chain: Mapping[str, Artifact], name: str, step: int | None) -> Iterator[str]:
    data = gather(name, chain)
    comparisons = comparisons_of(data)
    if step is not None:
        yield "Not evaluated: the evaluation of the run is that of the published weights."
        return
    if not comparisons:
        yield "Not evaluated on test prompts."
    yield from headlines_of(data)
    for comparison in comparisons:
        yield _table(comparison)


def _table(comparison: ModelComparison) -> str:
    a, b = comparison.name_a, comparison.name_b
    rows = [f"| mean over {comparison.outcome.total} prompts [95 %] | {a} | {b} | difference |"]
    rows.append("|---|---|---|---|")
    rows += [
        f"| {row.label} | {row.a or DASH} | {row.b or DASH} | {row.difference} |"
        for row in marked_rows(comparison)
    ]
    return "\n".join(rows)


def _limits(
    artifact: Artifact,
    base: tuple[str | None, str | None],
    chain: Mapping[str, Artifact],
    step: int | None,
) -> Iterator[str]:
    if artifact.stage == "ppo":
        yield (
            "It maximises a reward, which only stands for what people want: answers may please the "
            "reward more than a reader. Rewards are comparable within this run alone."
        )
    elif artifact.stage == "dpo":
        yield "It follows the preferences of its data, with their errors and leanings."
    if "eval" in chain and step is None:
        prompts = (chain["eval"].json("facts.json") or {}).get("prompts")
        if prompts:
            yield f"It was evaluated on {prompts} prompts of the kind of its training data only."
    yield (
        "Nothing was done for safety beyond its data: it can be wrong, biased and offensive. Do "
        "not use it where answers have consequences without checks of your own."
    )
    if not base[0]:
        yield "It was trained from nothing on little data: it shows that training works, no more."
    yield "Other prompt formats, languages and longer texts than in training give worse answers."


def _origin(artifact: Artifact, used: Mapping[str, Artifact]) -> Iterator[str]:
    manifest = artifact.manifest
    keys = ", ".join(f"{stage} `{made.key}`" for stage, made in used.items())
    revision = manifest.git.get("revision", "unknown")
    yield f"- Made by rlhf_exp {__version__}, revision `{revision}`, {manifest.created[:10]}"
    yield f"- Keys of the results in its store: {keys}"
    shown = ("torch", "transformers", "tokenizers")
    versions = [f"{n} {manifest.versions[n]}" for n in shown if n in manifest.versions]
    if versions:
        yield f"- {', '.join(versions)}"
