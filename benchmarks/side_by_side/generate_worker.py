"""The peer for sampling alone: `transformers.generate`.

usage: python -m side_by_side.generate_worker SETTING_AS_JSON        (run by `benchmarks/ppo.py`)
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from transformers import GenerationConfig, GPTNeoXForCausalLM

from side_by_side.protocol import Line, Reading, peak_bytes, resident_bytes
from side_by_side.setting import Setting


def main() -> None:
    """Sample one iteration's responses each time the harness asks."""
    setting = Setting.from_json(sys.argv[1])
    line = Line()
    started = resident_bytes()
    torch.manual_seed(setting.seed)
    dtype = getattr(torch, setting.precision)
    model = GPTNeoXForCausalLM.from_pretrained(setting.path("policy"), dtype=dtype).eval()
    prompts = torch.from_numpy(np.load(setting.path("prompts.npy")))
    sampling = GenerationConfig(
        max_new_tokens=setting.response_tokens, do_sample=True, top_k=0, top_p=1.0, temperature=1.0
    )
    line.ready(started)
    iteration = 0
    while True:
        line.wait()
        begin = time.perf_counter()
        rows = torch.arange(setting.rollouts).add(iteration * setting.rollouts) % len(prompts)
        batch = prompts[rows]
        with torch.inference_mode():
            output = model.generate(
                batch, attention_mask=torch.ones_like(batch), generation_config=sampling
            )
        took = time.perf_counter() - begin
        new = output[:, setting.prompt_tokens :]
        line.answer(
            Reading({"sample": took, "total": took}, peak_bytes(), new.shape[0], new.numel())
        )
        iteration += 1


if __name__ == "__main__":
    main()
