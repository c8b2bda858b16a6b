"""Sources of data: the bundled toy data, JSON-lines files, and the Hugging Face hub.

Each returns a `Corpus`. Preferences also serve as demonstrations (the chosen side) and as prompts,
demonstrations also as prompts, unless a source has rows of that kind.

Every row that is read is used, or counted: as unusable, with its reason, or in the corpus's counts.
Where nothing is left of an input, that is an error which says what became of its rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_exp.data.files import is_saved, kind_of, read_records, saved_splits
from rlhf_exp.data.layouts import KNOWN, Columns, ParsedRows, read_rows
from rlhf_exp.data.parsing import (
    REPEATED_PROMPT,
    SEVERAL_TURNS,
    end_of_response,
    require_difference,
)
from rlhf_exp.data.rows import (
    Corpus,
    Demonstration,
    History,
    Preference,
    Prompt,
    Row,
    SourceFile,
    Splits,
    UnusableRow,
    convert_row,
    demonstrations_of,
    first_of_equal,
    held_out_keys,
    make_corpus,
    preferences_of,
    prompt_key,
    prompts_of,
    responses_of,
)
from rlhf_exp.errors import UserError

FilePaths = Path | str | Sequence[Path | str]
FileReader = Callable[[Path, int | None], Iterable[tuple[str, object]]]
Refusal = Callable[[History, Sequence[str]], str | None]
"""Says why a dialogue with these responses cannot be written; `None` if it can."""
MAX_ROWS_SHOWN = 5
"""Most unusable rows listed in an error."""
_REPEATED_SHARE, _REPEATED_WORDS = 0.9, 20
"""A file repeats its prompts if this share of its rows do, with this many words in all: fewer may
do so by chance ("Hi": "Hi there!")."""


@dataclass(frozen=True)
class LoadOptions:
    """Limits and splits of a source that is read from files or the hub.

    Attributes:
        validation_fraction: share of the prompts held out for validation, by hash.
        test_fraction: the same for test, if the source has no test split of its own.
        max_bad_fraction: most unusable rows, as a share of those read; more are an error.
        limit: most rows read of each file or split; `None` reads all.
        turns_in_responses: whether the responses of a pair may go on with turns of their own, in
            HH's markers; a prompt format with other markers cannot say them.
        refusal: asked of every row, for the run's prompt format; `None` refuses none.
        columns: the files' column for prompt, chosen and so on (`layouts.TARGETS`); empty: those of
            a known layout.
        reader: reads a file in place of the readers here: takes its path and the limit, returns
            ("file:number", record) of each record.
    """

    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    max_bad_fraction: float = 0.05
    limit: int | None = None
    turns_in_responses: bool = True
    refusal: Refusal | None = None
    columns: Columns = field(default_factory=dict)
    reader: FileReader | None = None


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


def load_arithmetic(
    seed: int,
    demonstrations: int = 6000,
    preferences: int = 4000,
    prompts: int = 3000,
    validation: int = 200,
    test: int = 500,
    numbers: int = 4,
    right: float = 0.5,
) -> Corpus:
    """Generate the bundled sums.

    Args:
        seed: of the generator.
        demonstrations: number of training rows for SFT.
        preferences: number of training pairs.
        prompts: number of training prompts for PPO.
        validation: number of validation prompts, and of pairs.
        test: number of test prompts, and of pairs.
        numbers: numbers in a sum.
        right: expected share of the demonstrations that are right.
    """
    from rlhf_exp.data.arithmetic import ArithmeticSizes, corpus_rows

    sizes = ArithmeticSizes(demonstrations, preferences, prompts, validation, test)
    return make_corpus(*corpus_rows(seed, sizes, numbers, right), unusable=[])


def load_jsonl(
    *,
    preferences: FilePaths = (),
    demonstrations: FilePaths = (),
    prompts: FilePaths = (),
    test: FilePaths = (),
    options: LoadOptions | None = None,
) -> Corpus:
    """Read files of any kind in `files`.

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
        paths = [files] if isinstance(files, (str, Path)) else files
        if paths:
            key = f"data.{name}"
            files_of_input = [_opened(Path(path), key, options) for path in paths]
            reader.read(key, files_of_input, kind, is_test=kind is None)
    return reader.corpus()


def _opened(
    path: Path, key: str, options: LoadOptions
) -> tuple[str, str, Iterable[tuple[str, object]]]:
    """Return the name, the kind and the records of a file."""
    if options.reader is not None:
        return str(path), "read by data.reader", options.reader(path, options.limit)
    return str(path), kind_of(path), read_records(path, key)


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
    splits = load_splits(path, revision, data_dir)
    if train_split not in splits:
        raise UserError(
            f"data.path: {path} has no split {train_split!r}; it has {', '.join(splits)}"
        )
    reader = _RowReader(options)
    for name in (train_split, test_split):
        if name in splits and (name == train_split or len(splits[name])):
            label = f"{path}[{name}]"
            records = ((f"{label}:{n}", record) for n, record in enumerate(splits[name]))
            reader.read(label, [(label, "a data set", records)], None, is_test=name == test_split)
    return reader.corpus()


def load_splits(path: str, revision: str | None, data_dir: str | None = None) -> Any:  # noqa: ANN401
    """Return the splits of a data set of the hub, or of a folder, unread.

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets

    try:
        if is_saved(Path(path)):
            return saved_splits(Path(path))
        return datasets.load_dataset(path, revision=revision, data_dir=data_dir)
    except Exception as error:  # `datasets` raises some twenty unrelated classes
        raise UserError(
            f"data.path: cannot load {path!r} at revision {revision!r} from the hub: "
            f"{type(error).__name__}: {error}. Without a network, fetch it first or "
            "use data=hh_local"
        ) from error


@dataclass
class _Input:
    """The rows of one config key or split, and those that cannot be used."""

    label: str
    is_test: bool
    rows: list[Row] = field(default_factory=list)
    unusable: list[UnusableRow] = field(default_factory=list)
    read: int = 0


class _RowReader:
    """Reads records into rows to train and to test on; keeps those that cannot be used apart."""

    def __init__(self, options: LoadOptions) -> None:
        self._options = options
        self._inputs: list[_Input] = []
        self._counts: Counter[str] = Counter()
        self.files: list[SourceFile] = []

    def read(
        self,
        label: str,
        files: Sequence[tuple[str, str, Iterable[tuple[str, object]]]],
        kind: type[Row] | None,
        is_test: bool,
    ) -> None:
        """Parse the records of files; with a `kind`, rows that cannot serve as it are unusable.

        Args:
            label: The config key, or the split.
            files: Name, kind and records of each file.
            kind: What the rows are to serve as; None: whatever they are.
            is_test: Whether they are held out.
        """
        source = _Input(label, is_test)
        self._inputs.append(source)
        parsed: list[tuple[Row, set[str]]] = []
        for name, file_kind, records in files:
            content = read_rows(
                islice(records, self._options.limit), name, kind, self._options.columns
            )
            parsed += content.rows
            source.unusable += content.unusable
            source.read += content.read
            self._counts.update({what: n for what, n in content.counts.items() if n})
            self.files.append(_summary(name, file_kind, content))
        repeated = _prompts_are_repeated([row for row, _ in parsed])
        for row, notes in parsed:
            try:
                source.rows.append(self._usable(row, kind, repeated, notes))
                self._counts.update(notes)
            except ValueError as error:
                source.unusable.append(UnusableRow(row.origin, str(error)))

    def _usable(self, row: Row, kind: type[Row] | None, repeated: bool, notes: set[str]) -> Row:
        """Return the row as one of `kind`.

        Raises:
            ValueError: it cannot serve as such.
        """
        if repeated and _repeats_prompt(row):
            row = _without_prompt(row)
            notes.add(REPEATED_PROMPT)
        row = convert_row(row, kind)
        goes_on = [end_of_response(response) is not None for response in responses_of(row)]
        if isinstance(row, Preference) and any(goes_on) and not self._options.turns_in_responses:
            raise ValueError(
                f"`{'chosen' if goes_on[0] else 'rejected'}` goes on with turns of its own, which "
                "only data.format=hh can say; give pairs that part at their last response"
            )
        refusal = self._options.refusal
        reason = None if refusal is None else refusal(row.history, responses_of(row))
        if reason is not None:
            raise ValueError(reason)
        if any(goes_on[:1]):
            notes.add(SEVERAL_TURNS)
        return row

    def corpus(self) -> Corpus:
        """Return the rows in their splits.

        Raises:
            UserError: too many rows are unusable, or nothing is left of an input.
        """
        self._check_unusable()
        test_rows = [row for source in self._inputs if source.is_test for row in source.rows]
        test_histories = {row.history for row in test_rows}
        train, dropped = [], 0
        left_out: list[str] = []
        for source in self._inputs:
            if not source.is_test:
                kept = [row for row in source.rows if row.history not in test_histories]
                if not kept:
                    left_out.append(self._why_left_out(source))
                train += kept
                dropped += len(source.rows) - len(kept)
        self._count("training rows left out: their prompt is a test prompt", dropped)
        splits = self._split(train, {prompt_key(row.history) for row in test_rows})
        demonstrations, prompts = self._demonstrations(splits), self._prompts(splits)
        preferences = [preferences_of(rows) for rows in splits]
        _check_train("preference pairs", preferences)
        _check_train("demonstrations", demonstrations)
        _check_train("prompts", prompts)
        if test_rows:
            demonstrations += self._demonstrations([test_rows])
            prompts += self._prompts([test_rows])
            preferences.append(preferences_of(test_rows))
        unusable = [row for source in self._inputs for row in source.unusable]
        corpus = make_corpus(
            Splits(*demonstrations),
            Splits(*preferences),
            Splits(*prompts),
            unusable,
            dropped,
            dict(self._counts),
        )
        # An evaluation alone may well have nothing but test rows.
        return replace(corpus, left_out="\n".join(left_out), files=self.files)

    def _split(self, rows: list[Row], test_keys: set[str]) -> list[list[Row]]:
        """Return the rows for training, for validation and, without a test input, for test."""
        keys = [prompt_key(row.history) for row in rows]
        options = self._options
        validation, test = held_out_keys(
            keys, test_keys, options.validation_fraction, options.test_fraction
        )
        self._count(
            "training rows whose prompt differs from a test prompt in case, white space or "
            "compatible characters alone",
            sum(key in test_keys for key in keys),
        )
        splits: list[list[Row]] = [[], []] if test_keys else [[], [], []]
        for key, row in zip(keys, rows, strict=True):
            splits[1 if key in validation else 2 if key in test - test_keys else 0].append(row)
        return splits

    def _demonstrations(self, splits: list[list[Row]]) -> list[list[Demonstration]]:
        """Return the demonstrations of each split; if none has any, the pairs' chosen sides."""
        derived = not any(isinstance(row, Demonstration) for rows in splits for row in rows)
        if derived:
            pairs = [row for rows in splits for row in preferences_of(rows)]
            empty = sum(not row.chosen for row in pairs)
            self._count("pairs with an empty chosen side: nothing to imitate", empty)
        return [
            [replace(row, response=_first_response(row.response)) for row in rows]
            for rows in (demonstrations_of(rows, derived) for rows in splits)
        ]

    def _prompts(self, splits: list[list[Row]]) -> list[list[Prompt]]:
        """Return the prompts of each split, each once; if none has any, those of all rows."""
        derived = not any(isinstance(row, Prompt) for rows in splits for row in rows)
        prompts = [prompts_of(rows, derived) for rows in splits]
        first = [first_of_equal(rows) for rows in prompts]
        repeated = sum(map(len, prompts)) - sum(map(len, first))
        self._count("rows with the prompt of another row: each prompt is asked once", repeated)
        return [
            [replace(row, original=row.original and _first_response(row.original)) for row in rows]
            for rows in first
        ]

    def _count(self, what: str, number: int) -> None:
        if number:
            self._counts[what] += number

    def _check_unusable(self) -> None:
        """Raise if an input has no usable row, or all of them together too few."""
        for source in self._inputs:
            if not source.rows:
                total = source.read
                if not source.unusable:
                    listed = "".join(f"\n  {n}: {what}" for what, n in self._counts.items())
                    raise UserError(
                        f"{source.label}: no usable row to "
                        f"{'test' if source.is_test else 'train'} on in {total} records{listed}"
                    )
                raise UserError(
                    f"{source.label}: no usable row to {'test' if source.is_test else 'train'} on "
                    f"({len(source.unusable)} of {total} rows read are unusable); expected "
                    f"one of the layouts {KNOWN}"
                    f"{_listed(source.unusable)}"
                )
        unusable = [row for source in self._inputs for row in source.unusable]
        total = sum(source.read for source in self._inputs)
        allowed = self._options.max_bad_fraction
        if len(unusable) > allowed * total:
            raise UserError(
                f"data: {len(unusable)} of {total} rows are unusable, more than "
                f"data.max_bad_fraction={allowed} allows; mend them or raise it{_listed(unusable)}"
            )

    def _why_left_out(self, source: _Input) -> str:
        """Return why nothing of an input, all of test rows, is trained on."""
        test = " and ".join(other.label for other in self._inputs if other.is_test)
        return (
            f"{source.label}: all {len(source.rows)} rows are left out, because their prompts are "
            f"test prompts, those of {test}. Give it rows with other prompts, or no test rows: "
            "data.test_fraction then holds some prompts out"
        )


def _summary(name: str, kind: str, content: ParsedRows) -> SourceFile:
    return SourceFile(name, kind, dict(content.layouts), list(content.kept), content.read)


def _check_train(name: str, splits: Sequence[Sequence[Row]]) -> None:
    """Raise if the rows of a kind are all held out."""
    if not splits[0] and any(splits):
        raise UserError(
            f"data: all {sum(map(len, splits))} {name} are held out for validation or test, and "
            "none is left to train on; give more of them, or lower data.validation_fraction and "
            "data.test_fraction"
        )


def _listed(unusable: Sequence[UnusableRow]) -> str:
    listed = "".join(f"\n  {row.origin}: {row.reason}" for row in unusable[:MAX_ROWS_SHOWN])
    more = len(unusable) - MAX_ROWS_SHOWN
    return f"{listed}\n  and {more} more" if more > 0 else listed


def _first_response(response: str) -> str:
    """Return a response up to where it goes on with turns of its own."""
    return response[: end_of_response(response)].strip()


def _repeats_prompt(row: Row) -> bool:
    """Return whether every response begins with the prompt, a single turn."""
    responses = responses_of(row)
    if not responses or len(row.history) > 1:
        return False
    return all(response.startswith(row.history[0].text) for response in responses)


def _prompts_are_repeated(rows: Sequence[Row]) -> bool:
    """Return whether a file's responses are whole texts, which begin with their prompts."""
    single = [row for row in rows if len(row.history) == 1 and responses_of(row)]
    repeated = [row for row in single if _repeats_prompt(row)]
    words = sum(len(text.split()) for text in {row.history[0].text for row in repeated})
    return words >= _REPEATED_WORDS and len(repeated) >= max(2, _REPEATED_SHARE * len(single))


def _without_prompt(row: Row) -> Row:
    """Return a row that repeats its prompt with the rest of its responses.

    Raises:
        ValueError: the responses do not differ after the prompt, or are empty.
    """
    start = len(row.history[0].text)
    rest = [response[start:].strip() for response in responses_of(row)]
    if isinstance(row, Preference):
        require_difference(*rest)
        return replace(row, chosen=rest[0], rejected=rest[1])
    if not rest[0]:
        raise ValueError("the response is the prompt alone")
    assert isinstance(row, Demonstration), "records yield no prompts with responses"
    return replace(row, response=rest[0])
