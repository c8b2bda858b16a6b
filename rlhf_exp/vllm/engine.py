"""The vLLM rollout engine: the policy's weights are pushed to servers, which answer token ids.

Each push has a name, and a server answers for the weights of that name or not at all. After a push
some answers' log-probabilities are compared with the policy's own forward pass, so that weights
that arrived wrong are noticed before anything learns from them. A server that ends is started
again, gets the same weights, and is asked the same again: an answer is a function of seed, prompt
and weights.

B prompts, T response tokens.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_exp.batch import Prompts, Samples
from rlhf_exp.data.batching import right_padded
from rlhf_exp.distributed.world import World
from rlhf_exp.errors import UserError
from rlhf_exp.models.lora import lora_layers, merged_state
from rlhf_exp.models.policy import Policy
from rlhf_exp.models.pretrained import context_of
from rlhf_exp.rollout.engine import RolloutRequest
from rlhf_exp.rollout.sampler import SamplingParams
from rlhf_exp.rollout.transcript import Stopper, Transcript
from rlhf_exp.vllm.server import Server, ServerGone

log = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 4
"""Times that the same work is tried before a failing server is the user's to look at."""
PROBE_ROWS, PROBE_PROMPT, PROBE_TOKENS = 4, 8, 4
"""Answers that are compared with the policy after a push, and their lengths in tokens."""
GAPS = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest mean gap of log-probabilities in nats, by number format, that can be rounding.

In float32 it is near 1e-6, in bfloat16 near 1e-2; a head that has kept old weights makes it 0.15
and more, other weights more than one."""
_ORIGINS = ("_name_or_path", "name_or_path", "transformers_version", "is_local", "local_files_only")
BLOCK = 128
"""Positions of a block of vLLM's cache of keys and values, at most."""


@dataclass(frozen=True)
class VllmSettings:
    """What a server loads.

    Attributes:
        owner: The run, as servers name it to others.
        dtype: Number format of vLLM's weights.
        seq_length: Longest prompt and response together, in tokens.
        batch: Most rows decoded together by one server.
        sleeps: Whether a server gives its memory back while the policy trains.
        central: Whether the main process has all servers and asks them for everyone; else each
            process has its own.
    """

    owner: str
    dtype: torch.dtype
    seq_length: int
    batch: int
    sleeps: bool = False
    central: bool = True


class Row(NamedTuple):
    """A prompt to answer: its token ids, and the seed of its noise."""

    prompt: list[int]
    seed: int


class Answer(NamedTuple):
    """A response: its token ids, their log-probabilities, and what ended it for vLLM."""

    tokens: list[int]
    logprobs: list[float]
    end: str


class VllmEngine:
    """Samples by vLLM, see `RolloutEngine`.

    Args:
        policy: Whose weights are pushed.
        tokenizer: Of the policy; vLLM needs it for stop strings.
        servers: The servers of this process; none in a process that asks the main one's.
        settings: What they load.
        world: The processes.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        servers: Sequence[Server],
        settings: VllmSettings,
        world: World,
    ) -> None:
        self._servers, self._settings, self._world = list(servers), settings, world
        self.adopt(policy, tokenizer)
        self._weights = ""
        self._session, self._pushes = uuid.uuid4().hex[:8], 0
        self._folder = Path(tempfile.mkdtemp(prefix="rlhf-exp-weights-", dir=_roomy_folder(policy)))
        self._file = self._folder / "weights.safetensors"
        # Of a policy on a GPU: its weights in host memory, and those that the file has.
        self._kept: dict[str, Tensor] = {}
        self._filed, self._lock, self._direct = "", Lock(), True
        for server in self._servers:
            server.start()

    def adopt(self, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> None:
        """Serve another policy from now on; the next refresh pushes its weights."""
        self._policy = policy
        self._model = _model_request(policy, tokenizer, self._settings)
        self._version: int | None = None
        self._kept = {}
        self._opened = False
        self._probe: list[list[int]] = []

    def refresh(self, version: int) -> None:
        """See `RolloutEngine`."""
        if version != self._version:
            self._world.run_on_all(self._push_and_check)
            self._version = version

    def answer(self, prompts: Prompts, request: RolloutRequest) -> Samples:
        """See `RolloutEngine`."""
        assert self._version is not None, "the engine is refreshed before it answers"
        lengths = prompts.lengths.tolist()
        tokens = prompts.tokens.tolist()
        rows = [
            Row(prompt[:length], noise_seed(request.seed, number))
            for prompt, length, number in zip(
                tokens, lengths, prompts.rollout.tolist(), strict=True
            )
        ]
        answers = self._answer_all(rows, request.params, request.stopper)
        transcript, logprobs = _transcribe(answers, request.params, request.stopper)
        if request.on_ended is not None:
            request.on_ended(len(rows))
        return _samples(prompts, transcript, logprobs, request.params.pad_id)

    def release(self) -> None:
        """See `RolloutEngine`: a server on the policy's own GPU sleeps until the next push."""
        if self._settings.sleeps:
            self._world.run_on_all(lambda: self._each(lambda server: self._ask(server, "/sleep")))
            self._version = None

    def close(self) -> None:
        """See `RolloutEngine`."""
        for server in self._servers:
            server.close(self._settings.owner)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answer_all(
        self, rows: list[Row], params: SamplingParams, stopper: Stopper | None
    ) -> list[Answer]:
        """Return the answers to this process's rows; in every process, those to its own."""
        world = self._world
        if not self._settings.central:
            # What one process cannot do, no process goes on without.
            own: list[Answer] = []
            world.run_on_all(lambda: own.extend(self._answers(rows, params, stopper)))
            return own
        everyone = world.all_gather_object(rows)
        whole = [row for share in everyone for row in share]
        found = world.run_on_all(
            lambda: self._answers(whole, params, stopper) if world.is_main else []
        )[0]
        start = sum(len(share) for share in everyone[: world.rank])
        return [Answer(*answer) for answer in found[start : start + len(rows)]]

    def _answers(
        self, rows: list[Row], params: SamplingParams, stopper: Stopper | None
    ) -> list[Answer]:
        """Return the answers to rows, shared out over this process's servers."""
        longest = self._settings.seq_length - PROBE_TOKENS
        self._probe = [row.prompt[-longest:] for row in rows[:PROBE_ROWS] if longest > 0]
        servers = self._servers[: max(1, min(len(self._servers), len(rows)))]
        shares = [rows[number :: len(servers)] for number in range(len(servers))]
        parts = _in_parallel(
            [
                partial(self._ask_by_rules, server, share, params, stopper)
                for server, share in zip(servers, shares, strict=True)
            ]
        )
        answers: list[Answer | None] = [None] * len(rows)
        for number, part in enumerate(parts):
            answers[number :: len(servers)] = part
        return [answer for answer in answers if answer is not None]

    def _ask_by_rules(
        self, server: Server, rows: list[Row], params: SamplingParams, stopper: Stopper | None
    ) -> list[Answer]:
        """Return a server's answers; none ends at a stop string that is none by our rules.

        vLLM looks for stop strings in the text that follows the prompt's. A prompt that ends in the
        middle of a character changes what its first tokens mean. Such a row is asked for again,
        without stop strings: it begins as it did before.
        """
        answers = self._ask_for(server, rows, _request_of(params, stopper))
        if stopper is None:
            return answers
        early = [
            number
            for number, answer in enumerate(answers)
            if answer.end == "text" and stopper.content_length(answer.tokens) is None
        ]
        if early:
            whole = self._ask_for(server, [rows[n] for n in early], _request_of(params, None))
            for number, answer in zip(early, whole, strict=True):
                answers[number] = answer
        return answers

    def _ask_for(self, server: Server, rows: list[Row], request: dict[str, Any]) -> list[Answer]:
        """Return a server's answers, whatever becomes of it meanwhile."""
        body = {
            "weights": self._weights,
            "prompts": [row.prompt for row in rows],
            "seeds": [row.seed for row in rows],
            "params": request,
        }
        answer = self._ask(server, "/answer", **body)
        return _checked(answer, len(rows), request["max_tokens"], self._policy, server.name)

    def _ask(self, server: Server, route: str, **request: Any) -> dict[str, Any]:  # noqa: ANN401
        """Ask a server; one that fails gets the model and the weights again, and is asked again."""

        def work() -> dict[str, Any]:
            return server.ask(route, owner=self._settings.owner, **request)

        for _ in range(ATTEMPTS - 1):
            try:
                return work()
            except ServerGone as gone:
                server.restart(gone)
                self._load(server)
        try:
            return work()
        except ServerGone as gone:
            raise UserError(f"{server.name} fails again and again: {gone}") from gone

    def _load(self, server: Server) -> None:
        """Let a server load the model and take the weights that were pushed last."""
        owner = self._settings.owner
        for attempt in range(ATTEMPTS):
            try:
                while server.ask("/open", owner=owner, model=self._model)["again"]:
                    server.restart(ServerGone("it had loaded another model"))
                if self._weights:
                    server.push(self._weights_file(), owner=owner, weights=self._weights)
                return
            except ServerGone as gone:
                if attempt == ATTEMPTS - 1:
                    message = f"{server.name} does not load the model: {gone}"
                    raise UserError(message) from gone
                server.restart(gone)

    def _each(self, work: Callable[[Server], object]) -> None:
        _in_parallel([partial(work, server) for server in self._servers])

    def _push_and_check(self) -> None:
        if not self._servers:
            return
        self._pushes += 1
        self._weights = f"{self._session}-{self._pushes}"
        if self._world.device.type == "cuda":
            self._keep()
        else:
            save_file(dict(_weights_of(self._policy, self._settings.dtype)), self._file)
        self._each(self._push)
        self._opened = True
        self._each(self._check)

    def _keep(self) -> None:
        """Copy the weights to host memory: a server that dies later is to get the same ones."""
        for name, weight in _weights_of(self._policy, self._settings.dtype):
            if name not in self._kept or self._kept[name].shape != weight.shape:
                self._kept[name] = torch.empty_like(weight, device="cpu", pin_memory=True)
            self._kept[name].copy_(weight, non_blocking=True)
        torch.cuda.synchronize()

    def _weights_file(self) -> Path:
        """Return the file of the weights that were pushed last."""
        with self._lock:
            if self._kept and self._filed != self._weights:
                save_file(self._kept, self._file)
                self._filed = self._weights
        return self._file

    def _push(self, server: Server) -> None:
        if not self._opened:
            self._load(server)
            return
        names = {"owner": self._settings.owner, "weights": self._weights}
        direct = server.reads_gpu and self._direct
        try:
            if direct:
                weights = _weights_of(self._policy, self._settings.dtype)
                server.push_tensors(weights, **names)
                torch.cuda.ipc_collect()
            else:
                server.push(self._weights_file(), **names)
        except ServerGone as gone:  # after a transfer that failed an engine is of no use
            if direct:
                self._by_file(gone)
            server.restart(gone)
            self._load(server)

    def _by_file(self, reason: ServerGone) -> None:
        self._direct = False
        log.warning("weights no longer go to vLLM from GPU to GPU, but by a file: %s", reason)

    def _check(self, server: Server) -> None:
        """Compare a server's log-probabilities with the policy's.

        Raises:
            UserError: They are further apart than rounding takes them, also after a new start.
        """
        gap, limit = self._gap(server), self._largest_gap
        if gap > limit:
            failed = ServerGone(_gap_message(gap, limit))
            if server.reads_gpu and self._direct:
                self._by_file(failed)
            server.restart(failed)
            self._load(server)
            gap = self._gap(server)
        if not gap <= limit:
            raise UserError(
                f"{server.name}: {_gap_message(gap, limit)}, also after a new start. It does not "
                "compute what this model computes; use ppo.generation.engine=native"
            )

    @property
    def _largest_gap(self) -> float:
        half = (
            self._world.setup.precision == "bfloat16" or self._policy.model.dtype != torch.float32
        )
        return GAPS[torch.bfloat16 if half else self._settings.dtype]

    @torch.no_grad()
    def _gap(self, server: Server) -> float:
        """Return the mean absolute gap of log-probabilities in nats, over a few short answers."""
        rows = [Row(prompt, 1 + number) for number, prompt in enumerate(self._probe_prompts())]
        params = SamplingParams(PROBE_TOKENS, 1.0, PROBE_ROWS, -1, 0)
        answers = self._ask_for(server, rows, _request_of(params, None))
        pairs = [
            (np.array(row.prompt), np.array(answer.tokens))
            for row, answer in zip(rows, answers, strict=True)
        ]
        tokens, _ = right_padded(pairs)
        lengths = torch.tensor([[len(part) for part in pair] for pair in pairs])
        tokens, lengths = tokens.to(self._world.device), lengths.to(self._world.device)
        with self._world.autocast():
            own = self._policy.logprobs(tokens, lengths[:, 0], lengths[:, 1], 1.0)
        told = torch.tensor([answer.logprobs for answer in answers])
        return float((own.float().cpu() - told).abs().mean())

    def _probe_prompts(self) -> list[list[int]]:
        """Return the ends of prompts answered last; before the first ones, some random tokens."""
        if self._probe:
            return self._probe
        size = (PROBE_ROWS, PROBE_PROMPT)
        drawn = np.random.default_rng(0).integers(0, _vocabulary(self._policy), size)
        return [[int(token) for token in row] for row in drawn]


def noise_seed(seed: int, rollout: int) -> int:
    """Return the seed of a response's noise, 63 bits, from the run's and the rollout's number."""
    digest = hashlib.sha256(f"{seed}:{rollout}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _vocabulary(policy: Policy) -> int:
    # Not the head's rows: where parameters are sharded, they are elsewhere.
    return int(policy.model.config.get_text_config().vocab_size)


def _gap_message(gap: float, limit: float) -> str:
    return (
        f"after weights were pushed, its log-probabilities are {gap:.2g} nats a token from the "
        f"policy's; rounding makes less than {limit:g}"
    )


def _model_request(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, settings: VllmSettings
) -> dict[str, Any]:
    """Return the files of a model without weights, and the sizes that vLLM is to serve."""
    model = policy.model
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {
            path.name: path.read_text(encoding="utf-8")
            for path in sorted(Path(folder).iterdir())
            if path.is_file()
        }
    settings_file = "tokenizer_config.json"
    files[settings_file] = _plain(json.loads(files.get(settings_file, "{}")))
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    files["config.json"] = _plain(config)
    context = context_of(model.config)
    length = settings.seq_length if context is None else min(settings.seq_length, context)
    engine: dict[str, Any] = {
        "dtype": str(settings.dtype).removeprefix("torch."),
        "max_model_len": length,
        "max_num_seqs": settings.batch,
        "kv_cache_memory_bytes": _cache_bytes(policy, settings, length),
        "enable_sleep_mode": settings.sleeps,
    }
    return {"files": files, "engine": engine}


def _plain(values: dict[str, Any]) -> str:
    """Return a config as JSON, without what says where it came from: equal models load once."""
    kept = {name: value for name, value in values.items() if name not in _ORIGINS}
    return json.dumps(kept, default=str, sort_keys=True)


def _cache_bytes(policy: Policy, settings: VllmSettings, length: int) -> int:
    """Return the bytes of keys and values of a full batch of longest rows, and one row more."""
    config = policy.model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    positions = (settings.batch + 1) * (math.ceil(length / BLOCK) * BLOCK)
    each = 2 * config.num_hidden_layers * kv_heads * width * settings.dtype.itemsize
    return int(positions * each)


def _roomy_folder(policy: Policy) -> Path | None:
    """Return a folder in memory with room for the weights, or `None` for the usual one on disk."""
    shared = Path("/dev/shm")
    needed = sum(weight.numel() * weight.element_size() for weight in policy.model.parameters())
    if shared.is_dir() and os.access(shared, os.W_OK) and _free(shared) > 2 * needed + (1 << 28):
        return shared
    return None


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _weights_of(policy: Policy, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that a model folder would hold, where they are: a tied head once."""
    model = policy.model
    state = merged_state(model) if lora_layers(model) else dict(model.state_dict())
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in state.items():
        same = (value.data_ptr(), value.shape)
        if value.numel() and same in seen:
            continue
        seen.add(same)
        wanted = dtype if value.is_floating_point() else value.dtype
        yield name, value.detach().to(wanted).contiguous()


def _request_of(params: SamplingParams, stopper: Stopper | None) -> dict[str, Any]:
    """Return vLLM's sampling parameters but for the seed."""
    ends = sorted({params.eos_id, *params.end_ids} - {-1})
    request: dict[str, Any] = {
        "max_tokens": params.max_new_tokens,
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "logprobs": 0,
        # What ends a response is named here, whatever the model's own config says of it.
        "ignore_eos": True,
        "stop_token_ids": ends,
        "detokenize": False,
    }
    if stopper is not None and stopper.stop_strings:
        request |= {"stop": list(stopper.stop_strings), "skip_special_tokens": False}
        request["detokenize"] = True
    return request


def _checked(
    answer: dict[str, Any], rows: int, longest: int, policy: Policy, name: str
) -> list[Answer]:
    """Return a server's answers, once it is certain that they are answers.

    Raises:
        UserError: They are not.
    """
    vocabulary = _vocabulary(policy)
    try:
        answers = [
            Answer(list(row["tokens"]), list(row["logprobs"]), str(row["end"]))
            for row in answer["rows"]
        ]
        valid = len(answers) == rows and all(
            1 <= len(one.tokens) <= longest
            and len(one.tokens) == len(one.logprobs)
            and all(isinstance(token, int) and 0 <= token < vocabulary for token in one.tokens)
            and all(math.isfinite(value) and value < 1e-3 for value in one.logprobs)
            for one in answers
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{name}: answered something else than responses ({error!r})") from error
    if not valid:
        raise UserError(
            f"{name}: answered responses that cannot be: expected {rows} of 1 to {longest} tokens "
            f"below {vocabulary}, with finite log-probabilities"
        )
    return answers


def _transcribe(
    answers: list[Answer], params: SamplingParams, stopper: Stopper | None
) -> tuple[Transcript, list[list[float]]]:
    """Return the responses by this project's stop rules, and their log-probabilities.

    Raises:
        UserError: vLLM ended a response that these rules do not end.
    """
    # What comes after an end by these rules is cut off.
    ends = {params.eos_id, *params.end_ids}
    transcript = Transcript(len(answers), params.max_new_tokens, ends, stopper)
    logprobs = []
    for row, answer in enumerate(answers):
        ended = any(transcript.add(row, token) for token in answer.tokens)
        if not ended:
            raise UserError(
                f"vLLM ended a response of {len(answer.tokens)} tokens (by {answer.end}) before an "
                f"end token, a stop string or {params.max_new_tokens} tokens; use "
                "ppo.generation.engine=native"
            )
        logprobs.append(answer.logprobs[: len(transcript.responses[row])])
    return transcript, logprobs


def _samples(
    prompts: Prompts, transcript: Transcript, logprobs: list[list[float]], pad: int
) -> Samples:
    device = prompts.tokens.device
    pairs = [
        (row[:length].cpu().numpy(), np.array(response, dtype=np.int64))
        for row, length, response in zip(
            prompts.tokens, prompts.lengths.tolist(), transcript.responses, strict=True
        )
    ]
    width = max(len(prompt) + len(response) for prompt, response in pairs)
    longest = max(len(response) for _, response in pairs)
    tokens = np.full((len(pairs), width), pad, dtype=np.int64)
    columns = np.zeros((len(pairs), longest), dtype=np.float32)
    for row, ((prompt, response), values) in enumerate(zip(pairs, logprobs, strict=True)):
        tokens[row, : len(prompt) + len(response)] = np.concatenate([prompt, response])
        columns[row, : len(values)] = values
    return Samples(
        tokens=torch.from_numpy(tokens).to(device),
        prompt_lengths=prompts.lengths.to(device),
        response_lengths=torch.tensor([len(response) for _, response in pairs], device=device),
        content_lengths=torch.tensor(transcript.content_lengths, device=device),
        finish=torch.tensor([int(end) for end in transcript.finish], device=device),
        index=prompts.index,
        logprobs=torch.from_numpy(columns).to(device),
    )


def _in_parallel(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Return the tasks' results, in order; the first failure is raised after all have ended."""
    if len(tasks) == 1:
        return [tasks[0]()]
    with ThreadPoolExecutor(max(1, len(tasks))) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]
