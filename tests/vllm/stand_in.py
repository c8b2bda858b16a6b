"""Stands in for vLLM below the real worker: a transformers model that samples token by token.

It has what makes vLLM err silently: weights that do not arrive, a transfer that fails, a cache of
prompts that must be reset, a stop string that is seen where there is none.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import HTTPServer
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_exp.vllm.worker import vllm_worker


class StandInParams:
    """vLLM's SamplingParams, as far as they are used."""

    def __init__(self, seed: int, **values: Any) -> None:
        self.seed, self.values = seed, values


class StandInLLM:
    """vLLM's LLM, as far as it is used; `faults` says what goes wrong."""

    faults: frozenset[str] = frozenset()
    resets = 0
    updates = 0

    def __init__(self, model: str, dtype: str, **engine: Any) -> None:
        assert engine["load_format"] == "dummy"
        assert engine["logprobs_mode"] == "processed_logprobs"
        config = AutoConfig.from_pretrained(model)
        torch.manual_seed(77)
        self._model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        self._cache: dict[tuple[int, ...], Tensor] = {}
        on = engine["enable_sleep_mode"]
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=on))

    def start_weight_update(self) -> None:
        self._received: dict[str, Tensor] = {}

    def finish_weight_update(self) -> None:
        if self._received:
            self._model.load_state_dict(self._received, strict=False)

    def update_weights(self, request: dict[str, Any]) -> None:
        type(self).updates += 1
        if "fails" in self.faults and self.updates == 2:
            raise RuntimeError("the transfer was cut off")
        if "forgets" in self.faults and self.updates > 1:
            return
        info = request["update_info"]
        if "handles" in info:
            assert info["device"] == 0
            self._received |= dict(vllm_worker.rebuilt(one, 0) for one in info["handles"])
            return
        state = load_file(info["path"])
        missing, unknown = self._model.load_state_dict(state, strict=False)
        assert not unknown
        assert set(missing) <= {"lm_head.weight"}

    def apply_model(self, function: Any) -> None:
        assert function is vllm_worker._pack_heads_again

    def reset_prefix_cache(self) -> bool:
        if "keeps its cache" not in self.faults:
            self._cache.clear()
        type(self).resets += 1
        return True

    @torch.no_grad()
    def generate(
        self, prompts: list[dict[str, list[int]]], params: list[StandInParams], use_tqdm: bool
    ) -> list[Any]:
        return [
            SimpleNamespace(outputs=[self._row(prompt["prompt_token_ids"], one)])
            for prompt, one in zip(prompts, params, strict=True)
        ]

    def _row(self, prompt: list[int], params: StandInParams) -> Any:
        values, generator = params.values, torch.Generator().manual_seed(params.seed % 2**62)
        tokens: list[int] = []
        logprobs = []
        finish, reason = "length", None
        while len(tokens) < values["max_tokens"]:
            fed = (*prompt, *tokens)
            if fed not in self._cache:
                self._cache[fed] = self._model(torch.tensor([fed])).logits[0, -1].float()
            logits = self._cache[fed] / (values["temperature"] or 1.0)
            chances = logits.softmax(0)
            drawn = int(torch.multinomial(chances, 1, generator=generator))
            token = drawn if values["temperature"] else int(logits.argmax())
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=float(logits.log_softmax(0)[token]))})
            if token in values["stop_token_ids"]:
                finish, reason = "stop", token
                break
            if "stop" in values and "stops early" in self.faults:
                finish, reason = "stop", values["stop"][0]
                break
        return SimpleNamespace(
            token_ids=tokens, logprobs=logprobs, finish_reason=finish, stop_reason=reason
        )


class StandInServer:
    """A worker in a thread of this process, at an address that stays when it starts anew."""

    def __init__(self) -> None:
        self.worker = vllm_worker.Worker(private=False)
        self.deaths_left = 0
        handler = type("Handler", (vllm_worker.Handler,), {"worker": self.worker})
        original = handler._respond
        this = self

        def respond(self: Any, work: Any) -> None:
            if this.deaths_left and self.path == "/answer":
                this.deaths_left -= 1
                this.forget()
                self.close_connection = True
                return  # the connection closes without an answer
            original(self, work)

        handler._respond = respond  # type: ignore[attr-defined]
        self.handler = handler
        self._server = HTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._serve, daemon=True).start()

    def forget(self) -> None:
        """Be as a new process is."""
        worker = self.worker
        worker.model = worker.weights = worker.owner = worker._llm = None
        worker.leaving = False

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.worker.close()

    def _serve(self) -> None:
        self._server.serve_forever(poll_interval=0.02)


@contextmanager
def stand_in_servers(count: int, *faults: str) -> Iterator[list[StandInServer]]:
    """Yield workers over the stand-in, with these faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StandInLLM, "faults", frozenset(faults))
        patch.setattr(StandInLLM, "resets", 0)
        patch.setattr(StandInLLM, "updates", 0)
        modules = {
            "vllm": {"LLM": StandInLLM, "SamplingParams": StandInParams},
            "vllm.config": {"WeightTransferConfig": SimpleNamespace},
            "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        }
        for name, content in modules.items():
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        patch.setattr(vllm_worker, "_register_transfer", lambda: None)
        servers = [StandInServer() for _ in range(count)]
        yield servers
        for server in servers:
            server.close()
