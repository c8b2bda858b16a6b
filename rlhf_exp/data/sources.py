"""Sources of data: the bundled toy data, JSON-lines files, and the Hugging Face hub.

Each returns a `Corpus`. Preferences also serve as demonstrations (the chosen side) and as prompts,
demonstrations also as prompts, unless a source has rows of that kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_exp.data.parsing import FORMATS, UnreadableLine, parse_row, read_jsonl
from rlhf_exp.data.rows import (
    Corpus,
    Demonstration,
    History,
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
    responses_of,
)
from rlhf_exp.errors import UserError

FilePaths = Path | str | Sequence[Path | str]
Refusal = Callable[[History, Sequence[str]], str | None]
MAX_ROWS_SHOWN = 5
"""Most unusable rows listed in an error."""


@dataclass(frozen=True)
class LoadOptions:
    """Limits and splits of a source that is read from files or the hub.

    Attributes:
        validation_fraction: share of the prompts held out for validation, by hash.
        test_fraction: the same for test, if the source has no test split of its own.
        max_bad_fraction: most unusable rows, as a share of those read; more are an error.
        limit: most rows read of each file or split; `None` reads all.
        refusal: says why a dialogue with some responses cannot be written in the run's prompt
            format, or returns `None`; `None` asks nobody.
    """

    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    max_bad_fraction: float = 0.05
    limit: int | None = None
    refusal: Refusal | None = None


def load_toy(
    seed: int,
    demonstrations: int = 4000,
    preferences: int = 4000,
    prompts: int = 3200,
    validation: int = 200,
    test: int = 200,
    label_noise: float = 0.12,
) -> Corpus:
    """Generate the bundled data.

    Args:
        seed: of the generator.
        demonstrations: number of training rows for SFT.
        preferences: number of training pairs.
        prompts: number of training prompts for PPO.
        validation: number of validation prompts, and of pairs.
        test: number of test prompts, and of pairs.
        label_noise: expected share of pairs whose sides are exchanged.
    """
    from rlhf_exp.data.toy.generate import ToySizes, corpus_rows

    sizes = ToySizes(demonstrations, preferences, prompts, validation, test)
    demos, pairs, prompt_rows = corpus_rows(seed, sizes, label_noise)
    return make_corpus(demos, pairs, prompt_rows, unusable=[])


def load_jsonl(
    *,
    preferences: FilePaths = (),
    demonstrations: FilePaths = (),
    prompts: FilePaths = (),
    test: FilePaths = (),
    options: LoadOptions | None = None,
) -> Corpus:
    """Read `.jsonl` or `.jsonl.gz` files.

    `test` holds rows of any kind; without it, prompts are held out by hash.

    Raises:
        UserError: a file is missing, too many rows are unusable, or none is usable.
    """
    options = options or LoadOptions()
    reader = _RowReader(options)
    inputs: list[tuple[str, FilePaths, type[Row] | None]] = [
        ("preferences", preferences, Preference),
        ("demonstrations", demonstrations, Demonstration),
        ("prompts", prompts, Prompt),
        ("test", test, None),
    ]
    for name, files, kind in inputs:
        for path in [files] if isinstance(files, (str, Path)) else files:
            records = read_jsonl(Path(path), f"data.{name}")
            reader.read(islice(records, options.limit), kind, "test" if kind is None else "train")
    return reader.corpus(options)


def load_hub(
    path: str,
    revision: str | None = None,
    *,
    data_dir: str | None = None,
    train_split: str = "train",
    test_split: str = "test",
    options: LoadOptions | None = None,
) -> Corpus:
    """Load a data set from the hub, or from a folder in its layout, through `datasets`.

    Args:
        path: the hub id or folder.
        revision: commit, tag or branch.
        data_dir: a folder inside the data set.
        train_split: the split to train on.
        test_split: the split to test on; if there is none, prompts are held out by hash.
        options: limits and splits.

    Raises:
        UserError: it cannot be loaded, has no such split, or too many rows are unusable.
    """
    options = options or LoadOptions()
    splits = _load_dataset(path, revision, data_dir)
    if train_split not in splits:
        raise UserError(
            f"data.path: {path} has no split {train_split!r}; it has {', '.join(splits)}"
        )
    reader = _RowReader(options)
    for name, purpose in ((train_split, "train"), (test_split, "test")):
        if name in splits:
            records = ((f"{path}[{name}]:{n}", record) for n, record in enumerate(splits[name]))
            reader.read(islice(records, options.limit), None, purpose)
    return reader.corpus(options)


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
class _RowReader:
    """Reads records into rows to train and to test on; keeps those that cannot be used apart."""

    options: LoadOptions
    train: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    unusable: list[UnusableRow] = field(default_factory=list)

    def read(
        self, records: Iterable[tuple[str, object]], kind: type[Row] | None, purpose: str
    ) -> None:
        """Parse `records`; with a `kind`, rows that cannot serve as that kind are unusable."""
        rows = self.test if purpose == "test" else self.train
        for origin, record in records:
            try:
                if isinstance(record, UnreadableLine):
                    raise ValueError(record.reason)
                rows.append(self._accepted(convert_row(parse_row(record, origin), kind)))
            except ValueError as error:
                self.unusable.append(UnusableRow(origin, str(error)))

    def _accepted(self, row: Row) -> Row:
        """Return the row.

        Raises:
            ValueError: the run's prompt format cannot write it.
        """
        refusal = self.options.refusal
        reason = None if refusal is None else refusal(row.history, responses_of(row))
        if reason is not None:
            raise ValueError(reason)
        return row

    def corpus(self, options: LoadOptions) -> Corpus:
        """Return the rows in their splits.

        Raises:
            UserError: too many rows are unusable, or none is usable.
        """
        self._check(options.max_bad_fraction)
        keys = [prompt_key(row.history) for row in self.train]
        test_keys = {prompt_key(row.history) for row in self.test}
        validation, test = held_out_keys(
            keys, test_keys, options.validation_fraction, options.test_fraction
        )
        splits: Splits[Row] = Splits(test=self.test)
        dropped = 0
        for key, row in zip(keys, self.train, strict=True):
            if key in test_keys:
                dropped += 1
            elif key in test:
                splits.test.append(row)
            else:
                (splits.validation if key in validation else splits.train).append(row)
        return make_corpus(
            Splits(*(demonstrations_of(rows) for _, rows in splits.all())),
            Splits(*(preferences_of(rows) for _, rows in splits.all())),
            Splits(*(prompts_of(rows) for _, rows in splits.all())),
            self.unusable,
            dropped,
        )

    def _check(self, max_bad_fraction: float) -> None:
        unusable = len(self.unusable)
        total = unusable + len(self.train) + len(self.test)
        if self.train and unusable <= max_bad_fraction * total:
            return
        listed = "".join(
            f"\n  {row.origin}: {row.reason}" for row in self.unusable[:MAX_ROWS_SHOWN]
        )
        if unusable > MAX_ROWS_SHOWN:
            listed += f"\n  and {unusable - MAX_ROWS_SHOWN} more"
        if not self.train:
            raise UserError(
                f"data: no usable row to train on ({unusable} of {total} rows read are unusable); "
                f"expected {FORMATS}{listed}"
            )
        raise UserError(
            f"data: {unusable} of {total} rows are unusable, more than "
            f"data.max_bad_fraction={max_bad_fraction} allows; mend them or raise it{listed}"
        )
