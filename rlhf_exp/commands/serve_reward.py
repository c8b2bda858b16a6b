"""`rlhf-exp serve-reward RUN`: a trained reward model as a server, on a device of its own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_exp.commands.runs import OutputFolder
from rlhf_exp.config.compose import from_dict
from rlhf_exp.config.experiment import Config, Dtype, PromptFormat
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import Precision, open_world
from rlhf_exp.errors import UserError
from rlhf_exp.models.pretrained import load_tokenizer
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.pipeline.keys import MODEL_FILES
from rlhf_exp.serving.listen import address_of, is_local, listen, need_server, serve
from rlhf_exp.serving.reward_server import RequestScorer
from rlhf_exp.stages.training import attention_of, torch_dtype
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.fingerprint import DigestCache, key_of
from rlhf_exp.training.reward_scorer import ModelScorer


@dataclass(frozen=True)
class ServeOptions:
    """How to serve; what is `None` is as in the run that made the model.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        device: as torch names it; `None`: the first GPU, or the processor.
        batch: rows of one forward.
        seq_length: most tokens of a row.
        dtype: number format of weights and products, `float32` or `bfloat16`.
        format: how prompts are written, of a model that no run made.
        key_env: environment variable with the key that clients must send.
    """

    host: str = "127.0.0.1"
    port: int = 8480
    device: str | None = None
    batch: int | None = None
    seq_length: int | None = None
    dtype: str | None = None
    format: str = "hh"
    key_env: str | None = None


def serve_reward(outputs: Path, run: str, wanted: ServeOptions) -> None:
    """Serve the reward model of a run, or in a folder, until Ctrl-C.

    Raises:
        UserError: there is no such model, device or key, or the address cannot be had.
    """
    need_server("serve-reward", "serve")
    from rlhf_exp.serving.reward_server import make_app

    key = None if wanted.key_env is None else os.environ.get(wanted.key_env)
    if wanted.key_env is not None and not key:
        raise UserError(f"--key-env {wanted.key_env}: no such environment variable, or it is empty")
    bound = listen(wanted.host, wanted.port)
    scores = load_scores(outputs, run, wanted)
    address = address_of(bound)
    print(f"{run}: reward {scores.name} on {scores.scorer.device}, {address}")
    print(f"  ppo.reward.url={address} ppo.reward.name={scores.name}")
    if not is_local(bound):
        print(
            "Others on the network can reach this address, without encryption"
            + ("." if key else " and without a key (--key-env).")
        )
    print("Ctrl-C ends it.", flush=True)
    serve(make_app(scores, key), bound)


def load_scores(outputs: Path, run: str, wanted: ServeOptions) -> RequestScorer:
    """Load a reward model and name it after all that decides its scores.

    Raises:
        UserError: see `serve_reward`.
    """
    folder, config = _found(OutputFolder(outputs), run, wanted)
    half = Dtype.bfloat16 in (config.distributed.precision, config.model.dtype)
    precision: Precision = "bfloat16" if half else "float32"
    model = RewardModel.load(folder, dtype=torch_dtype(config), attention=attention_of(config))
    codec = Codec(load_tokenizer(folder), config.data.format.value)
    longest = max(config.reward.seq_length, config.ppo.seq_length)
    context = getattr(model.trunk.config, "max_position_embeddings", None) or longest
    length = min(wanted.seq_length or longest, context)
    scorer = ModelScorer(
        model,
        codec,
        None,
        open_world(precision),
        wanted.batch or config.ppo.generation.batch,
        length,
        _device(wanted.device),
    )
    digest = DigestCache(outputs / "cache" / "digests.json").folder(folder, MODEL_FILES)
    how = [config.data.format.name, config.model.dtype.name, precision, length]
    return RequestScorer(scorer, codec, key_of({"model": digest, "how": how}))


def _found(outputs: OutputFolder, run: str, wanted: ServeOptions) -> tuple[Path, Config]:
    """Return the folder of a reward model, and the config to use it with."""
    folder, artifacts = Path(run), dict[str, Artifact]()
    if (folder / MANIFEST).is_file():
        found = Artifact(folder, Manifest.read(folder))
        artifacts = {found.stage: found}
    elif not folder.is_dir():
        artifacts = outputs.artifacts(run)
    config = Config()
    if artifacts:
        if "reward" not in artifacts:
            has = ", ".join(artifacts)
            raise UserError(f"serve-reward {run}: no reward model there, only {has}")
        folder = artifacts["reward"].path / "model"
        # Of the last stage: a reward model may have been trained for a run with other lengths.
        config = from_dict(list(artifacts.values())[-1].manifest.config)
    else:
        config.data.format = PromptFormat[wanted.format]
    if wanted.dtype is not None:
        config.model.dtype = config.distributed.precision = Dtype[wanted.dtype]
    return folder, config


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name}: {reason}; expected cpu, cuda or cuda:N") from error
    return device
