from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import torch

from rlhf_exp.data.codec import Codec
from rlhf_exp.data.rows import Prompt, Turn
from rlhf_exp.data.tokenized import TokenizedPrompts, tokenize_prompts
from rlhf_exp.data.tokenizer import train_tokenizer
from rlhf_exp.engines.trlx.handover import hand_over
from rlhf_exp.engines.trlx.process import worker_folder
from tests.engines.trlx.lab import settings_with
from tests.engines.trlx.test_convert import model_of


def prompts_of(codec: Codec, count: int) -> TokenizedPrompts:
    rows = [
        Prompt((Turn("human", f"What is {n} plus {n}?"),), f"It is {2 * n}.", f"row {n}")
        for n in range(count)
    ]
    return tokenize_prompts(rows, codec, 64, 8)


def test_what_the_worker_is_given(tmp_path: Path) -> None:
    codec = Codec(train_tokenizer(["What is it plus it? It is so."], 300), "hh")
    model = model_of("gpt2")
    prompts, validation = prompts_of(codec, 7), prompts_of(codec, 9)
    settings = settings_with(chunk=4, seed=5)
    path = hand_over(tmp_path / "trlx", model, codec, prompts, validation, settings)
    plan = json.loads(path.read_text())
    # 2 iterations of 10 rollouts over 7 prompts: passes laid end to end, each of all prompts.
    assert len(plan["order"]) == 20
    assert sorted(plan["order"][:7]) == sorted(plan["order"][7:14]) == list(range(7))
    assert plan["order"][:7] == np.random.default_rng([5, 0]).permutation(7).tolist()
    assert plan["sizes"] == [4, 3, 3]
    rows = [json.loads(line) for line in Path(plan["prompts"]).read_text().splitlines()]
    assert rows == [{"index": n, "ids": prompts.prompt[n].tolist()} for n in range(7)]
    lines = Path(plan["validation"]).read_text().splitlines()
    assert len(lines) == 5, "ppo.eval_prompts of them"
    assert plan["stop_strings"] == ["Human:", "human:", "Assistant:", "assistant:"]
    assert Path(plan["weights"]).parent == path.parent
    assert plan["config"]["model"]["model_path"] == str(path.parent / "model")


def test_what_the_worker_compares(tmp_path: Path) -> None:
    codec = Codec(train_tokenizer(["What is it plus it? It is so."], 300), "hh")
    model = model_of("gpt_neox")
    prompts = prompts_of(codec, 3)
    path = hand_over(tmp_path / "trlx", model, codec, prompts, prompts, settings_with())
    check = json.loads(path.read_text())["check"]
    assert check["ids"] == [*prompts.prompt[0].tolist(), codec.eos_id]
    with torch.no_grad():
        logits = model(torch.tensor([check["ids"]])).logits[0].double()
    for number, token in enumerate(check["ids"][1:]):
        row = logits[number]
        expected = float(row[token] - row.exp().sum().log())
        assert abs(check["logprobs"][number] - expected) < 1e-5
    assert check["texts"][:2] == [
        "\n\nHuman: What is 0 plus 0?\n\nAssistant:",
        " It is 0.<|endoftext|>",
    ]
    assert check["text_ids"][1] == prompts.original[0].tolist()
    assert len(check["texts"]) == len(check["text_ids"]) == 6


def test_the_worker_needs_nothing_of_this_project() -> None:
    """Its interpreter has no rlhf_exp, and nothing of ours stands in front of its own modules."""
    own = {path.stem for path in worker_folder().glob("*.py")} - {"__init__", "__main__"}
    assert all(name.startswith("trlx_") for name in own)
    for path in worker_folder().glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] == "rlhf_exp"], path
