from __future__ import annotations

from rlhf_exp.config.experiment import Config, StageName
from rlhf_exp.launchers.points import SweepPoint, shared_work
from rlhf_exp.pipeline.plan import Step, StepState


def point(*steps: str) -> SweepPoint:
    """A point whose steps are `stage:key`, or `stage:key!` for one that is in the store."""
    made = []
    for text in steps:
        stage, _, key = text.partition(":")
        state = StepState.cached if key.endswith("!") else StepState.run
        made.append(Step(stage, key.rstrip("!"), state))
    return SweepPoint((), Config(), tuple(made))


def levels(*points: SweepPoint) -> list[list[str]]:
    found = shared_work(points)
    for level in found:
        for one in level:
            assert one.config.stage is StageName[one.steps[-1].stage]
    return [[f"{one.steps[-1].stage}:{one.key}" for one in level] for level in found]


def test_one_point_shares_nothing() -> None:
    assert levels(point("sft:s", "reward:r", "ppo:p")) == []


def test_what_all_share_is_one_job() -> None:
    points = [point("sft:s", "reward:r", f"ppo:{n}") for n in range(3)]
    assert levels(*points) == [["reward:r"]]


def test_what_is_there_already_needs_no_job() -> None:
    points = [point("sft:s!", "reward:r!", f"ppo:{n}") for n in range(3)]
    assert levels(*points) == []
    points = [point("sft:s!", "reward:r", f"ppo:{n}") for n in range(3)]
    assert levels(*points) == [["reward:r"]]


def test_chains_that_do_not_meet_run_side_by_side() -> None:
    points = [point(f"sft:{s}", f"reward:{s}r", f"ppo:{s}{n}") for s in "ab" for n in range(2)]
    assert levels(*points) == [["reward:ar", "reward:br"]]


def test_chains_that_meet_run_one_after_the_other() -> None:
    # One SFT model; two reward models, each for two points.
    points = [point("sft:s", f"reward:{r}", f"ppo:{r}{n}") for r in "ab" for n in range(2)]
    assert levels(*points) == [["sft:s"], ["reward:a", "reward:b"]]


def test_what_only_one_point_needs_is_its_own_affair() -> None:
    points = [point("sft:s", f"reward:{n}", f"ppo:{n}") for n in range(2)]
    assert levels(*points) == [["sft:s"]]


def test_points_that_end_where_others_begin() -> None:
    assert levels(point("sft:s"), point("sft:s", "reward:r")) == [["sft:s"]]
