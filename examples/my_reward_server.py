"""A reward server of one's own, by Python's standard library alone: `python my_reward_server.py`.

Then, in another terminal: `python launch.py experiment=smoke ppo.reward.url=http://127.0.0.1:8480`.
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = "ended-answers-1"  # Change it with the reward.


ROWS = False  # True asks for each prompt's other fields in the data: see docs/how-to/rewards.md.


def score(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """Return a number for each response; higher is better."""
    return [1.0 if response.endswith((".", "!", "?")) else 0.0 for response in responses]


class Handler(BaseHTTPRequestHandler):
    """Answers POST {"prompts": [...], "responses": [...]} by {"scores": [...]}."""

    protocol_version = "HTTP/1.1"  # Keeps connections open.

    def do_POST(self) -> None:
        """Score the responses of one request."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        # The first request, by which the server tells what it is, has no rows.
        rows = asked.get("rows", [{}] * len(asked["prompts"]))
        scores = score(asked["prompts"], asked["responses"], rows)
        body = json.dumps({"scores": scores, "name": NAME, "rows": ROWS}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", 8480), Handler).serve_forever()
