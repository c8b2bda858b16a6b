"""Agreement of judges with people, against scikit-learn, krippendorff and plain counting."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import krippendorff
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix

from rlhf_exp.errors import UserError
from rlhf_exp.evaluation.judges.human_agreement import (
    HumanAgreement,
    JudgeQuality,
    judge_quality,
    people_agreement,
    read_judged_pairs,
)
from rlhf_exp.evaluation.judges.protocol import AnswerPair
from rlhf_exp.evaluation.statistics import bootstrap, estimate_from_sums

NAN = math.nan


@pytest.fixture(scope="module")
def pandalm(shared_data: Path) -> Path:
    return shared_data / "pairwise" / "pandalm_testset_v1.json.gz"


def plain_rows(path: Path) -> list[dict]:
    return json.loads(gzip.decompress(path.read_bytes()))


def by_length(text_1: object, text_2: object) -> int:
    # A few of PandaLM's answers have become truth values.
    return int(np.sign(len(str(text_2)) - len(str(text_1))))


def test_people_of_real_labels(pandalm: Path) -> None:
    judged = read_judged_pairs(pandalm, "labels")
    found = people_agreement(judged.ratings, judged.annotators)
    rows = plain_rows(pandalm)
    votes = [[row[f"annotator{k}"] for k in (1, 2, 3)] for row in rows]
    assert (found.pairs, found.annotators) == (999, ("annotator1", "annotator2", "annotator3"))
    equal = sum((v[0] == v[1]) + (v[0] == v[2]) + (v[1] == v[2]) for v in votes)
    assert found.agreement is not None
    assert found.agreement.mean == pytest.approx(equal / (3 * 999))
    assert found.alpha is not None
    other = krippendorff.alpha(
        reliability_data=np.array(votes, dtype=float).T, level_of_measurement="nominal"
    )
    assert found.alpha.mean == pytest.approx(other, abs=1e-12)
    assert found.alpha.low < other < found.alpha.high
    # PandaLM: 0 is a tie, 1 the first response (a), 2 the second (b).
    most = [max((v.count(n), n) for n in (0, 1, 2)) for v in votes]
    counts = [sum(n == number and c > 1 for c, n in most) for number in (1, 2)]
    assert (found.counts[0], found.counts[2]) == tuple(counts)
    assert sum(found.counts) == 999


def test_a_judge_on_real_labels(pandalm: Path) -> None:
    judged = read_judged_pairs(pandalm, "labels")
    signs = [by_length(pair.answer_a, pair.answer_b) for pair in judged.pairs]
    found = judge_quality("longer", signs, judged.ratings)
    rows = plain_rows(pandalm)
    say = {0: 0, 1: -1, 2: 1}
    people = []
    for row in rows:
        votes = [say[row[f"annotator{k}"]] for k in (1, 2, 3)]
        people.append(next((s for s in (1, -1) if votes.count(s) > 1), 0))
    judge = [by_length(row["response1"], row["response2"]) for row in rows]
    assert found.pairs == 999
    assert np.array_equal(found.confusion, confusion_matrix(people, judge, labels=[-1, 0, 1]))
    assert found.agreement.mean == pytest.approx(accuracy_score(people, judge))
    assert found.kappa.mean == pytest.approx(cohen_kappa_score(people, judge))
    assert found.kappa.low < found.kappa.mean < found.kappa.high
    alpha = krippendorff.alpha(
        reliability_data=np.array([people, judge], dtype=float), level_of_measurement="nominal"
    )
    assert found.alpha.mean == pytest.approx(alpha, abs=1e-12)
    both = [(p, j) for p, j in zip(people, judge, strict=True) if p and j]
    assert found.decided is not None
    assert found.decided.mean == pytest.approx(sum(p == j for p, j in both) / len(both))
    single = [
        say[row[f"annotator{k}"]] == said
        for row, said in zip(rows, judge, strict=True)
        for k in (1, 2, 3)
    ]
    assert found.with_one.mean == pytest.approx(sum(single) / len(single))


def test_by_hand() -> None:
    # Judge: b b a tie b. People: b, a, a, tie, nobody; two of them on the first pair.
    ratings = [[1, 1], [-1, NAN], [-1, NAN], [NAN, 0], [NAN, NAN]]
    found = judge_quality("j", [1, 1, -1, 0, 1], ratings)
    assert found.pairs == 4
    assert found.confusion == ((1, 0, 1), (0, 1, 0), (0, 0, 1))
    assert found.agreement.mean == 0.75
    assert found.decided is not None
    assert found.decided.mean == pytest.approx(2 / 3)
    assert found.with_one.mean == pytest.approx(4 / 5)  # 2 + 0 + 1 + 1 of 5 judgments
    # Chance: people 2/4 a, 1/4 tie, 1/4 b; judge 1/4, 1/4, 2/4: (2 + 1 + 2) / 16. (12 - 5) / 11.
    assert found.kappa.mean == pytest.approx(7 / 11)
    people = people_agreement(ratings, ["x", "y"])
    assert (people.pairs, people.counts) == (4, (2, 1, 1))
    assert people.agreement is not None
    assert people.agreement.mean == 1.0
    for one in (found, people):
        plain = json.loads(json.dumps(one.to_json(), allow_nan=False))
        # NaN (the alpha of one pair judged alike) is unequal to itself.
        assert repr(type(one).from_json(plain)) == repr(one)


def test_one_annotator_has_nobody_to_agree_with() -> None:
    people = people_agreement([[1], [-1]], ["x"])
    assert people.agreement is None
    assert people.alpha is None
    assert HumanAgreement.from_json(people.to_json()) == people
    found = judge_quality("j", [0, 0], [[1], [-1]])
    assert found.decided is None
    assert JudgeQuality.from_json(found.to_json()) == found


def test_the_bootstrap_of_sums_is_that_over_rows() -> None:
    values = np.random.default_rng(3).integers(0, 2, size=(80, 1)).astype(float)
    columns = np.concatenate([values, np.ones((80, 1))], axis=1)
    found = estimate_from_sums(columns, lambda sums: sums[:, 0] / sums[:, 1], seed=0)
    plain = bootstrap(values, lambda rows: rows[..., 0].mean(axis=1), seed=0)
    assert found.mean == values.mean()
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.0126)
    alone = estimate_from_sums([[1.0]], lambda sums: sums[:, 0], seed=0)
    assert (alone.low, alone.high) == (-math.inf, math.inf)


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_votes_of_several_annotators(tmp_path: Path) -> None:
    pair = {"prompt": "p", "answer_a": "x", "answer_b": "y"}
    other = {"prompt": "q", "answer_a": "x", "answer_b": "y"}
    path = write(
        tmp_path / "votes.jsonl",
        {**pair, "annotator": "ben", "criterion": "helpful", "winner": "a"},
        {**other, "annotator": "ben", "criterion": "helpful", "winner": "tie"},
        {**pair, "annotator": "anna", "criterion": "helpful", "winner": "b"},
        {**pair, "annotator": "anna", "criterion": "harmless", "winner": "a"},
    )
    found = read_judged_pairs(path, "labels")
    assert found.pairs == (AnswerPair("p", "x", "y"), AnswerPair("q", "x", "y"))
    assert found.annotators == ("anna", "ben")
    assert np.array_equal(found.ratings, [[1, -1], [NAN, 0]], equal_nan=True)
    assert found.question == "helpful; the file also has harmless"
    harmless = read_judged_pairs(path, "labels", "harmless")
    assert harmless.ratings.tolist() == [[-1]]
    assert (harmless.criterion, harmless.other_criteria) == ("harmless", ("helpful",))
    assert len(found.first(1).pairs) == len(found.first(1).ratings) == 1
    assert found.first(1).question == found.question
    with pytest.raises(UserError, match="no judged pairs on 'honest'; it has votes on helpful, h"):
        read_judged_pairs(path, "labels", "honest")
    unnamed = write(tmp_path / "unnamed.jsonl", {**pair, "winner": "a"})
    assert read_judged_pairs(unnamed, "labels").question == ""
    with pytest.raises(UserError, match="names no questions, so none can be 'honest'"):
        read_judged_pairs(unnamed, "labels", "honest")


def test_real_preferences_hide_the_chosen_side(shared_data: Path) -> None:
    path = shared_data / "hh" / "harmless-test.jsonl.gz"
    found = read_judged_pairs(path, "labels")
    assert len(found.pairs) + found.unusable == 250
    share = (found.ratings == 1).mean()
    assert 0.4 < share < 0.6
    lines = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    pair = found.pairs[0]
    chosen = pair.answer_b if found.ratings[0, 0] == 1 else pair.answer_a
    assert lines[0]["chosen"].endswith(chosen)
    assert pair.prompt.startswith("\n\nHuman: ")
    assert pair.prompt.endswith("\n\nAssistant:")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "p"}', r"f.jsonl:1: KeyError 'instruction'; expected prompt, answer_a"),
        ('{"prompt": "p", "answer_a": "", "answer_b": "", "winner": "c"}', "KeyError 'c'"),
        ('{"prompt": 1, "answer_a": "", "answer_b": "", "winner": "a"}', "a text or the judgment"),
        ('{"instruction": "", "response1": "", "response2": ""}', "the judgment is missing"),
        ('{"instruction": "", "response1": "", "response2": "", "annotator1": 3}', "KeyError 3"),
        ("[1]", "row 1: found int"),
        ("[1", "cannot be read"),
        ("nonsense", "f.jsonl:1: not JSON"),
        ("", "has no judged pairs; expected"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=says):
        read_judged_pairs(path, "labels")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="labels: no such file"):
        read_judged_pairs(tmp_path / "none.json", "labels")
