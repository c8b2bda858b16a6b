"""How much each hyperparameter of an Optuna study matters, by functional ANOVA.

fANOVA (Hutter, Hoos and Leyton-Brown, 2014) fits a random forest to the trials and splits its
variance over the search space. With few trials it fits noise, so there is nothing below `FEWEST`.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_exp.report.sweep.data import Importance

if TYPE_CHECKING:
    from optuna import Study

FEWEST = 50
_JOURNAL = "study/journal.log"
_AIMS = {
    "reward_at_kl": "the highest validation reward within the study's budget of KL",
    "penalised_reward": "the highest validation reward less the study's penalty of KL",
    "final_reward": "the validation reward at the end",
    "win_rate_at_kl": "the highest validation win rate over SFT within the study's budget of KL",
}
NO_STUDY = "there is no Optuna study: importance is estimated from the trials of a search"


def importance_of(folders: Sequence[Path]) -> Importance:
    """Return the importance of the hyperparameters of the study in the runs' folder.

    Args:
        folders: Those of the runs' names; with more than one there is no single study.
    """
    journals = [path for folder in folders if (path := folder / _JOURNAL).exists()]
    if not journals:
        return Importance(0, reason=NO_STUDY)
    if len(folders) > 1:
        return Importance(0, reason="these are the runs of several names, not of one study")
    try:
        import optuna
    except ImportError:
        return Importance(0, reason="Optuna is not installed (pip install 'rlhf-exp[sweeps]')")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _of_study(_loaded(journals[0], Path(folder)))


def _loaded(journal: Path, folder: Path) -> Study | None:
    """Load a study from a copy without the line that a worker is writing now."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    copy = folder / journal.name
    shutil.copyfile(journal, copy)
    content = copy.read_bytes()
    copy.write_bytes(content[: content.rfind(b"\n") + 1])
    storage = JournalStorage(JournalFileBackend(str(copy)))
    names = [study.study_name for study in storage.get_all_studies()]
    return optuna.load_study(study_name=names[0], storage=storage) if names else None


def _of_study(study: Study | None) -> Importance:
    import optuna

    if study is None:
        return Importance(0, reason="the study has no trials yet")
    aim = _AIMS.get(study.user_attrs.get("about", {}).get("objective", ""), "")
    complete = optuna.trial.TrialState.COMPLETE
    count = len(study.get_trials(deepcopy=False, states=(complete,)))
    if count < FEWEST:
        return Importance(
            count,
            reason=f"the study has {count} complete trials, and from fewer than {FEWEST} the "
            "estimate says more about chance than about hyperparameters",
            objective=aim,
        )
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except ImportError:
        reason = "fANOVA needs scikit-learn (pip install 'rlhf-exp[sweeps]')"
        return Importance(count, reason=reason, objective=aim)
    except (ValueError, RuntimeError) as error:
        reason = f"fANOVA found nothing to explain ({error})"
        return Importance(count, reason=reason, objective=aim)
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return Importance(count, tuple((name, float(share)) for name, share in ordered), objective=aim)
