"""Sampling in a stage: the rollout engine that the config asks for, and requests to it."""

from __future__ import annotations

import torch

from rlhf_exp.config.experiment import Config, Dtype
from rlhf_exp.config.training import (
    CORRECTION_AUTO,
    CORRECTION_LIMIT,
    GenerationConfig,
    RolloutEngineName,
)
from rlhf_exp.data.tokenizer import Codec
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.models.policy import Policy
from rlhf_exp.processes.environment import VISIBLE, visible_devices
from rlhf_exp.rollout.engine import RolloutEngine, RolloutRequest
from rlhf_exp.rollout.native_engine import NativeEngine
from rlhf_exp.rollout.sampler import SamplingParams
from rlhf_exp.rollout.transcript import Stopper
from rlhf_exp.stages.context import StageContext
from rlhf_exp.stages.setup import cache_of
from rlhf_exp.vllm.engine import VllmEngine, VllmSettings
from rlhf_exp.vllm.server import LocalServer, RemoteServer, Server


def rollout_engine(
    config: Config,
    context: StageContext,
    policy: Policy,
    codec: Codec,
    world: World,
    section: GenerationConfig | None = None,
    ahead: bool = False,
) -> RolloutEngine:
    """Return the engine that samples from `policy` while it trains.

    Args:
        config: The experiment.
        context: Of the stage: what its processes write goes to its folder.
        policy: Who answers; its frozen weights in the number format that they compute in.
        codec: Of the policy.
        world: Device and precision.
        section: The section that chooses the engine; PPO's by default.
        ahead: Whether it samples while the policy's weights change, so that it needs their copy.
    """
    section = section or config.ppo.generation
    if section.engine is RolloutEngineName.vllm:
        return vllm_engine(config, context, policy, codec, world, section)
    return native_engine(policy, world, ahead)


def native_engine(policy: Policy, world: World, ahead: bool = False) -> NativeEngine:
    """Return the engine that samples in this process; the arguments are `rollout_engine`'s."""
    replicated = world.setup.strategy in ("single", "ddp")
    half = world.setup.precision == "bfloat16" and replicated
    copy_dtype = torch.bfloat16 if half else None
    if ahead:
        copy_dtype = copy_dtype or world.weights_dtype or torch.float32
    return NativeEngine(policy, copy_dtype, world.autocast)


def vllm_engine(
    config: Config,
    context: StageContext,
    policy: Policy,
    codec: Codec,
    world: World,
    section: GenerationConfig,
) -> VllmEngine:
    """Return vLLM as a `generation` section places it; the arguments are `rollout_engine`'s."""
    central = bool(section.urls) or section.placement != "shared" or world.processes == 1
    settings = VllmSettings(
        owner=f"{context.stage}-{context.key}",
        dtype=vllm_dtype(config, section),
        seq_length=config.dpo.seq_length if context.stage == "dpo" else config.ppo.seq_length,
        batch=config.eval.batch if context.stage == "eval" else section.batch,
        sleeps=not section.urls and section.placement == "shared" and world.device.type == "cuda",
        central=central,
    )
    servers: list[Server] = []
    if section.urls and world.is_main:
        servers += [RemoteServer(url) for url in section.urls]
    elif world.is_main or not central:
        for number, (devices, trainer_gpu) in enumerate(_vllm_devices(section, world)):
            log_file = context.folder / f"vllm-{world.rank}-{number}.log"
            variables = {"OMP_NUM_THREADS": str(torch.get_num_threads()), VISIBLE: devices}
            servers.append(LocalServer(section.interpreter, log_file, variables, trainer_gpu))
    return VllmEngine(policy, codec.tokenizer, servers, settings, world)


def _vllm_devices(section: GenerationConfig, world: World) -> list[tuple[str, int | None]]:
    """Return for each vLLM of this process the GPUs that it sees, as in `CUDA_VISIBLE_DEVICES`.

    It computes on the first one. The second, if there is one, is the trainer's, from which it reads
    weights. The number beside them is that of the trainer's; `None` without a GPU.
    """
    if section.placement == "cpu" or world.device.type != "cuda":
        return [("", None)]
    names = visible_devices()
    own = world.device.index or 0
    numbers = [own] if section.gpus is None else section.gpus
    if beyond := [number for number in numbers if number >= len(names)]:
        raise UserError(
            f"ppo.generation.placement={section.placement}: there is no GPU {beyond[0]}; "
            f"{len(names)} are visible here, from 0 on"
        )
    return [
        (names[own], 0) if number == own else (f"{names[number]},{names[own]}", 1)
        for number in numbers
    ]


def vllm_dtype(config: Config, section: GenerationConfig) -> torch.dtype:
    """Return the number format of vLLM's weights: the section's, or the policy's own."""
    name = config.computes_in.name if section.dtype is None else section.dtype.name
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def rollout_request(
    config: Config,
    codec: Codec,
    seed: int,
    section: GenerationConfig | None = None,
    capture: bool = False,
    close: bool = False,
) -> RolloutRequest:
    """Return a request for answers as a `generation` section says.

    Args:
        config: The experiment.
        codec: Of the policy.
        seed: Of the noise.
        section: The section; PPO's by default.
        capture: Whether to keep the states entering the first training block, where these are
            exact enough to train on.
        close: Whether to keep the state of an end-of-sequence token after each answer, too, where a
            reward model over the policy's trunk reads its score.
    """
    section = section or config.ppo.generation
    params = SamplingParams(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        batch=section.batch,
        eos_id=codec.eos_id,
        end_ids=codec.end_ids,
        pad_id=codec.pad_id,
        cache=cache_of(config),
    )
    return RolloutRequest(
        params,
        seed,
        Stopper(codec.tokenizer, codec.stop_strings),
        capture=capture and exact(config),
        close=codec.eos_id if close else None,
    )


def exact(config: Config) -> bool:
    """Whether decoding and a full forward agree: to 1e-4 in fp32, but to 0.02 nats in bf16."""
    return config.computes_in is Dtype.float32


def correction_of(config: Config) -> float | None:
    """Return the largest importance weight of a token in PPO; `None`: all are 1.

    By default weights make up for whatever is more than rounding between sampler and policy.
    """
    section = config.ppo.generation
    if section.correction != CORRECTION_AUTO:
        return section.correction_limit
    vllm = section.engine is RolloutEngineName.vllm
    rounded = vllm and vllm_dtype(config, section) != torch.float32
    same = exact(config) and not rounded and section.ahead == 0
    return None if same else CORRECTION_LIMIT
