"""`rlhf-exp serve-reward RUN`: a trained reward model as a server, on a device of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_exp.commands.runs import OutputFolder
from rlhf_exp.config.compose import from_dict
from rlhf_exp.config.experiment import Config, Dtype, PrecisionName, PromptFormat
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import open_world
from rlhf_exp.errors import UserError
from rlhf_exp.models.pretrained import load_tokenizer
from rlhf_exp.models.reward_model import RewardModel
from rlhf_exp.pipeline.keys import MODEL_FILES
from rlhf_exp.redaction import secret_variable
from rlhf_exp.serving.listen import address_of, is_local, listen, need_server, serve
from rlhf_exp.serving.reward_server import RequestScorer
from rlhf_exp.stages.setup import attention_of, precision_of, torch_dtype
from rlhf_exp.store.artifact import MANIFEST, Artifact, Manifest
from rlhf_exp.store.fingerprint import DigestCache, key_of
from rlhf_exp.training.reward_scorer import ModelScorer


@dataclass(frozen=True)
class ServeOptions:
    """Options of a reward server; `None` means as in the run that trained the model.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        device: as torch names it; `None`: the first GPU, or the processor.
        batch: rows of one forward.
        seq_length: most tokens of a row.
        dtype: number format of weights and products, `float32` or `bfloat16`.
        format: prompt format of a model that no run trained.
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


def serve_reward(outputs: Path, run: str, options: ServeOptions) -> None:
    """Serve the reward model of a run, or in a folder, until Ctrl-C.

    Raises:
        UserError: there is no such model, device or key, or the address is in use.
    """
    need_server("serve-reward", "serve")
    from rlhf_exp.serving.reward_server import make_app

    key = None if options.key_env is None else secret_variable(options.key_env)
    if options.key_env is not None and not key:
        raise UserError(
            f"--key-env {options.key_env}: no such environment variable, or it is empty"
        )
    listener = listen(options.host, options.port)
    scorer = load_request_scorer(outputs, run, options)
    address = address_of(listener)
    print(f"{run}: reward {scorer.name} on {scorer.scorer.device}, {address}")
    print(f"  ppo.reward.url={address} ppo.reward.name={scorer.name}")
    if not is_local(listener):
        print(
            "Others on the network can reach this address, without encryption"
            + ("." if key else " and without a key (--key-env).")
        )
    print("Ctrl-C ends it.", flush=True)
    serve(make_app(scorer, key), listener)


def load_request_scorer(outputs: Path, run: str, options: ServeOptions) -> RequestScorer:
    """Load a reward model; its name is a digest of everything that determines its scores.

    Raises:
        UserError: see `serve_reward`.
    """
    folder, config = _model_and_config(OutputFolder(outputs), run, options)
    precision = precision_of(config)
    model = RewardModel.load(folder, dtype=torch_dtype(config), attention=attention_of(config))
    codec = Codec(load_tokenizer(folder), config.data.format.value)
    longest = max(config.reward.seq_length, config.ppo.seq_length)
    context = getattr(model.trunk.config, "max_position_embeddings", None) or longest
    length = min(options.seq_length or longest, context)
    world = open_world(precision)
    device = _device(options.device)
    scorer = ModelScorer(
        model.to(device),
        codec,
        None,
        world,
        options.batch or config.ppo.generation.batch,
        length,
        device,
    )
    digest = DigestCache(outputs / "cache" / "digests.json").folder(folder, MODEL_FILES)
    settings = [config.data.format.name, config.model.dtype.name, precision, length]
    return RequestScorer(scorer, codec, key_of({"model": digest, "how": settings}))


def _model_and_config(
    outputs: OutputFolder, run: str, options: ServeOptions
) -> tuple[Path, Config]:
    """Return the folder of a reward model, and the config for its use."""
    folder, artifacts = Path(run), dict[str, Artifact]()
    if (folder / MANIFEST).is_file():
        artifact = Artifact(folder, Manifest.read(folder))
        artifacts = {artifact.stage: artifact}
    elif not folder.is_dir():
        artifacts = outputs.artifacts(run, ("reward",))
    config = Config()
    if artifacts:
        if "reward" not in artifacts:
            stages = ", ".join(artifacts)
            raise UserError(f"serve-reward {run}: no reward model there, only {stages}")
        artifacts["reward"].verify(lambda name: name.startswith("model/"))
        folder = artifacts["reward"].path / "model"
        # The last stage's config: the run may use other lengths than the reward model's training.
        config = from_dict(list(artifacts.values())[-1].manifest.config)
    else:
        config.data.format = PromptFormat[options.format]
    if options.dtype is not None:
        config.model.dtype = Dtype[options.dtype]
        config.distributed.precision = PrecisionName[options.dtype]
    return folder, config


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name}: {reason}; expected cpu, cuda or cuda:N") from error
    return device
