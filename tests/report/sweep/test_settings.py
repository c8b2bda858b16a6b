"""Which hyperparameters vary, and which runs are replicates."""

from __future__ import annotations

from rlhf_exp.report.sweep.settings import Origin, flatten, given, settle


def origin(config: dict[str, object] | None, *overrides: str) -> Origin:
    return Origin(overrides, None if config is None else flatten(config))


def test_a_command_line_and_a_config_write_one_number_alike() -> None:
    assert given(["ppo.lr=1e-4", "+ppo.x=[1,2]", "a=null", "b=True", "~c"]) == {
        "ppo.lr": "0.0001",
        "ppo.x": "[1, 2]",
        "a": "null",
        "b": "true",
    }
    made = origin({"ppo": {"lr": 0.0001, "epochs": 4}}, "ppo.lr=1e-4")
    failed = origin(None, "ppo.lr=1e-4")
    assert settle([made, failed]).varied == ()


def test_what_a_failed_run_does_not_say_is_the_default_of_those_that_do_not_say_it() -> None:
    said = origin({"ppo": {"lr": 0.0001, "epochs": 8}}, "ppo.lr=1e-4", "ppo.epochs=8")
    silent = origin({"ppo": {"lr": 0.001, "epochs": 4}}, "ppo.lr=1e-3")
    failed = origin(None, "ppo.lr=1e-2")
    found = settle([said, silent, failed])
    assert found.varied == ("ppo.lr", "ppo.epochs")
    assert found.settings[2] == {"ppo.lr": "0.01", "ppo.epochs": "4"}


def test_seeds_are_no_settings_and_where_runs_are_kept_is_none() -> None:
    runs = [
        origin({"seed": n, "ppo": {"seed": n, "lr": 1.0}, "name": f"n{n}"}, f"seed={n}", "name=x")
        for n in range(2)
    ]
    found = settle(runs)
    assert found.varied == ()
    assert found.seeds == ("0", "1")


def test_several_seeds_are_named() -> None:
    runs = [origin({"sft": {"seed": a}, "ppo": {"seed": b}}) for a, b in ((0, 0), (0, 1), (1, 1))]
    assert settle(runs).seeds == ("0", "ppo 1, sft 0", "1")


def test_a_group_choice_is_one_column_however_much_it_changes() -> None:
    runs = [
        origin({"model": {"name": name, "width": width}}, f"model={name}")
        for name, width in (("small", 1), ("large", 2))
    ]
    assert settle(runs).varied == ("model",)
    # Where command lines do not tell runs apart, configs do.
    without = [origin({"model": {"name": name}}) for name in ("small", "large")]
    assert settle(without).settings == ({"model.name": "small"}, {"model.name": "large"})
