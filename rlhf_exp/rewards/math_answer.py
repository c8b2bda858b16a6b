r"""A reward by rule for tasks with mathematical answers.

`ppo.reward.function=rlhf_exp.rewards.math_answer:score` compares the last expression of a response
with the row's reference, the field `answer`, by math-verify
(https://github.com/huggingface/Math-Verify): as mathematics, not as text, so that 1/2 is 0.5 and
`\boxed{75}` is 75. A reference is a number, a formula between dollars, or a whole solution, whose
last expression counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf_exp.errors import UserError

FIELDS = ("answer",)


def score(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> list[float]:
    """Return 1 for each response whose answer is the row's `answer`, and 0 for each other.

    Raises:
        UserError: math-verify is not installed, or a reference has no mathematical expression.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise UserError(
            "math-verify is not installed; run `pip install math-verify` (extra `math`)"
        ) from error
    scores = []
    for text, row in zip(responses, rows, strict=True):
        answer = str(row["answer"])
        reference = parse(answer)
        if not reference:
            raise UserError(
                f"the reference {answer[:80]!r} has no mathematical expression; the field `answer` "
                "is to hold the result: a number, or a formula between dollars"
            )
        scores.append(float(verify(reference, parse(text))))
    return scores
