"""Where rows come from: the bundled toy data, JSON lines, or the hub.

Every source gives the same `Corpus`. Preferences also serve as demonstrations (the chosen side) and
as prompts, demonstrations also as prompts, unless rows of that kind are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_exp.data.parsing import FORMATS, UnreadableLine, parse_row, read_jsonl
from rlhf_exp.data.rows import (
    Corpus,
    Demonstration,
    Preference,
    Prompt,
    Row,
    Splits,
    UnusableRow,
    convert_row,
    demonstrations_of,
    held_out_keys,
    make_corpus,
    preferences_of,
    prompt_key,
    prompts_of,
)
from rlhf_exp.errors import UserError

Files = Path | str | Sequence[Path | str]
SHOWN = 5  # unusable rows shown in an error


@dataclass(frozen=True)
class LoadOptions:
    """How a source's rows are taken.

    Attributes:
        validation_fraction: of the prompts, put aside by hash.
        test_fraction: the same, where the source has no test split of its own.
        max_bad_fraction: of the rows read, above which unusable ones stop the run.
        limit: rows read of each file or split; `None` reads all.
    """

    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    max_bad_fraction: float = 0.05
    limit: int | None = None


def load_toy(
    seed: int,
    demonstrations: int = 4000,
    preferences: int = 4000,
    prompts: int = 3200,
    validation: int = 200,
    test: int = 200,
    label_noise: float = 0.12,
) -> Corpus:
    """Generate the bundled data; `demonstrations`, `preferences`, `prompts` are rows to train on.

    `validation` and `test` count the prompts held out, and as many pairs. `label_noise` is the
    expected share of pairs whose sides are exchanged.
    """
    from rlhf_exp.data.toy.generate import ToySizes, corpus_rows

    sizes = ToySizes(demonstrations, preferences, prompts, validation, test)
    demos, pairs, asked = corpus_rows(seed, sizes, label_noise)
    return make_corpus(demos, pairs, asked, unusable=[])


def load_jsonl(
    *,
    preferences: Files = (),
    demonstrations: Files = (),
    prompts: Files = (),
    test: Files = (),
    rules: LoadOptions | None = None,
) -> Corpus:
    """Read `.jsonl` or `.jsonl.gz` files.

    `test` holds rows of any kind; without it prompts are put aside by hash.

    Raises:
        UserError: a file is missing, too many rows are unusable, or none is usable.
    """
    rules = rules or LoadOptions()
    read = _Rows()
    named: list[tuple[str, Files, type[Row] | None]] = [
        ("preferences", preferences, Preference),
        ("demonstrations", demonstrations, Demonstration),
        ("prompts", prompts, Prompt),
        ("test", test, None),
    ]
    for name, files, kind in named:
        for path in [files] if isinstance(files, (str, Path)) else files:
            records = read_jsonl(Path(path), f"data.{name}")
            read.take(islice(records, rules.limit), kind, "test" if kind is None else "train")
    return read.corpus(rules)


def load_hub(
    path: str,
    revision: str | None = None,
    *,
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    rules: LoadOptions | None = None,
) -> Corpus:
    """Load a data set from the hub, or from a folder in its layout, through `datasets`.

    Args:
        path: the hub id or folder.
        revision: commit, tag or branch.
        data_dir: a folder inside the data set.
        train_split: the split to train on.
        test_split: the split to test on; where there is none, prompts are put aside by hash.
        rules: how rows are taken.

    Raises:
        UserError: it cannot be loaded, has no such split, or too many rows are unusable.
    """
    rules = rules or LoadOptions()
    splits = _load_dataset(path, revision, data_dir)
    if train_split not in splits:
        raise UserError(
            f"data.path: {path} has no split {train_split!r}; it has {', '.join(splits)}"
        )
    read = _Rows()
    for name, purpose in ((train_split, "train"), (test_split, "test")):
        if name in splits:
            records = ((f"{path}[{name}]:{n}", record) for n, record in enumerate(splits[name]))
            read.take(islice(records, rules.limit), None, purpose)
    return read.corpus(rules)


def _load_dataset(path: str, revision: str | None, data_dir: str | None) -> Any:  # noqa: ANN401
    import datasets

    try:
        return datasets.load_dataset(path, revision=revision, data_dir=data_dir)
    except Exception as error:  # `datasets` raises some twenty unrelated classes
        raise UserError(
            f"data.path: cannot load {path!r} at revision {revision!r} from the hub: "
            f"{type(error).__name__}: {error}. Without a network, fetch it first or "
            "use data=hh_local"
        ) from error


@dataclass
class _Rows:
    """Rows read so far, by purpose, and those that could not be used."""

    train: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    unusable: list[UnusableRow] = field(default_factory=list)

    def take(
        self, records: Iterable[tuple[str, object]], kind: type[Row] | None, purpose: str
    ) -> None:
        """Parse `records`; with a `kind`, rows that cannot serve as it are unusable."""
        rows = self.test if purpose == "test" else self.train
        for origin, record in records:
            try:
                if isinstance(record, UnreadableLine):
                    raise ValueError(record.reason)
                rows.append(convert_row(parse_row(record, origin), kind))
            except ValueError as error:
                self.unusable.append(UnusableRow(origin, str(error)))

    def corpus(self, rules: LoadOptions) -> Corpus:
        """Divide the rows into splits, after checking that enough are usable."""
        self._check(rules.max_bad_fraction)
        keys = [prompt_key(row.history) for row in self.train]
        own_test = {prompt_key(row.history) for row in self.test}
        validation, test = held_out_keys(
            keys, own_test, rules.validation_fraction, rules.test_fraction
        )
        parts: Splits[Row] = Splits(test=self.test)
        dropped = 0
        for key, row in zip(keys, self.train, strict=True):
            if key in own_test:
                dropped += 1
            elif key in test:
                parts.test.append(row)
            else:
                (parts.validation if key in validation else parts.train).append(row)
        return make_corpus(
            Splits(*(demonstrations_of(rows) for _, rows in parts.all())),
            Splits(*(preferences_of(rows) for _, rows in parts.all())),
            Splits(*(prompts_of(rows) for _, rows in parts.all())),
            self.unusable,
            dropped,
        )

    def _check(self, max_bad_fraction: float) -> None:
        bad, good = len(self.unusable), len(self.train) + len(self.test)
        if self.train and bad <= max_bad_fraction * (bad + good):
            return
        listed = "".join(f"\n  {row.origin}: {row.reason}" for row in self.unusable[:SHOWN])
        if bad > SHOWN:
            listed += f"\n  and {bad - SHOWN} more"
        if not self.train:
            raise UserError(
                f"data: no usable row to train on ({bad} of {bad + good} rows read are unusable); "
                f"expected {FORMATS}{listed}"
            )
        raise UserError(
            f"data: {bad} of {bad + good} rows are unusable, more than "
            f"data.max_bad_fraction={max_bad_fraction} allows; mend them or raise it{listed}"
        )
