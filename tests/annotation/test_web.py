"""The pages, by a client that has no scripts."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest

from rlhf_exp.annotation.campaign import Choice, display_order, display_side, item_of
from tests.annotation.lab import Visitor, new_campaign

HOSTILE = (
    '<script>document.title = "owned"</script>',
    "<img src=x onerror=\"document.title = 'owned'\">",
    "</div></form></main><h1>owned</h1>",
    '"><button name="choice" value="A">',
    "{{ 7 * 7 }} {% raw %} ${7*7}",
)


def test_a_vote_is_stored_and_leads_to_the_next_question(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, count=3)
    anna = Visitor(campaign)
    assert "0 of 3 answered" in anna.page()
    assert anna.vote(1, "A") == (303, "/2")
    assert anna.vote(3, "Tie") == (303, "/2")
    assert "2 of 3 answered" in anna.page(2)
    assert anna.vote(2, "B") == (303, "")
    assert "All 3 questions are answered" in anna.page()
    votes = {vote.item: vote for vote in campaign.votes()}
    shown = display_order(campaign.items, 0, "anna")
    assert [votes[item.id].choice.value for item in shown] == ["A", "B", "Tie"]
    assert all(vote.annotator == "anna" and vote.revision == 1 for vote in votes.values())
    assert all(vote.seconds is not None and 0 <= vote.seconds < 60 for vote in votes.values())
    assert "0 of 3 answered" in Visitor(campaign, "ben").page()


def test_the_side_shown_is_the_side_stored(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, count=8)
    for name in ("anna", "ben"):
        visitor = Visitor(campaign, name)
        for number, item in enumerate(display_order(campaign.items, 0, name), 1):
            shown = visitor.answers(number)
            # Whoever sees model b's answer first and says A means model b.
            visitor.vote(number, "A")
            (vote,) = (one for one in campaign.votes(name) if one.item == item.id)
            assert shown == [item.answer_a, item.answer_b][:: -1 if vote.side else 1]
            assert vote.winner == ("b" if shown[0].startswith("second") else "a")
    sides = [vote.side for vote in campaign.votes()]
    assert 0 < sum(sides) < 16


def test_pages_name_no_model(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, count=2)
    anna = Visitor(campaign)
    for text in (anna.page(), anna.page(1)):
        for secret in (
            "SFT",
            "PPO",
            campaign.info.source,
            campaign.info.owner,
            campaign.info.secret,
        ):
            assert secret not in text
        assert not any(item.id in text for item in campaign.items)


def test_an_answer_is_shown_again_and_can_be_changed(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, count=3)
    anna = Visitor(campaign)
    anna.vote(1, "A")
    anna.vote(2, "A")
    pressed = re.findall(r'value="(\w+)"[^>]*aria-pressed="true"', anna.page(1))
    assert pressed == ["A"]
    # The next open question, not the one after the changed one, which is answered.
    assert anna.vote(1, "B") == (303, "/3")
    item = display_order(campaign.items, 0, "anna")[0]
    (vote,) = (one for one in campaign.votes() if one.item == item.id)
    assert (vote.choice, vote.revision) == (Choice.B, 2)
    assert 'aria-label="Question 1, answered: B"' in anna.page()


def test_sent_twice_counts_once_and_a_stale_form_is_refused(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, count=2)
    anna = Visitor(campaign)
    form = anna.fields(1)
    for _ in range(2):
        answer = anna.client.post(f"{anna.home}/1", data=form | {"choice": "A"})
        assert answer.status_code == 303
    assert [vote.revision for vote in campaign.votes()] == [1]
    stale = anna.client.post(f"{anna.home}/1", data=form | {"choice": "B"})
    assert stale.status_code == 409
    assert "changed in another window" in stale.text
    assert re.findall(r'value="(\w+)"[^>]*aria-pressed="true"', stale.text) == ["A"]
    assert [vote.choice.value for vote in campaign.votes()] == ["A"]
    script = {"Accept": "application/json"}
    told = anna.client.post(f"{anna.home}/1", data=form | {"choice": "B"}, headers=script)
    assert (told.status_code, list(told.json())) == (409, ["message"])
    told = anna.client.post(f"{anna.home}/1", data=form | {"choice": "A"}, headers=script)
    assert told.json() == {"next": f"{anna.home}/2"}


def test_every_criterion_is_asked(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, count=2, criteria=("helpful", "harmless"))
    anna = Visitor(campaign)
    assert "Which answer is more harmless?" in anna.page(1)
    assert anna.vote(1, "A", "helpful") == (303, "/1")
    assert "0 of 2 answered" in anna.page(1)
    current = anna.page(1).split("data-current")[1]
    assert 'name="criterion" value="harmless"' in current
    assert anna.vote(1, "Tie", "harmless") == (303, "/2")
    assert "1 of 2 answered" in anna.page(1)


@pytest.mark.parametrize(
    "changed",
    [
        {"token": "0" * 64},
        {"token": ""},
        {"shown": "1"},
        {"shown": "soon"},
        {"criterion": "funny"},
        {"choice": "C"},
        {"revision": "x"},
    ],
)
def test_a_form_that_was_not_served_is_refused(tmp_path: Path, changed: dict[str, str]) -> None:
    campaign = new_campaign(tmp_path)
    anna = Visitor(campaign)
    form = anna.fields(1) | {"choice": "A"} | changed
    assert anna.client.post(f"{anna.home}/1", data=form).status_code == 403
    assert campaign.votes() == []


def test_a_token_belongs_to_one_annotator_and_one_question(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path)
    anna, ben = Visitor(campaign), Visitor(campaign, "ben")
    form = anna.fields(1) | {"choice": "A"}
    assert anna.client.post(f"{anna.home}/2", data=form).status_code == 403
    for number in range(1, 7):
        assert ben.client.post(f"{ben.home}/{number}", data=form).status_code == 403
    for missing in ("token", "shown", "choice", "criterion", "revision"):
        fields = {name: value for name, value in form.items() if name != missing}
        assert anna.client.post(f"{anna.home}/1", data=fields).status_code == 403
    assert campaign.votes() == []


def test_without_a_link_nothing_is_shown(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path)
    anna = Visitor(campaign)
    form = anna.fields(1) | {"choice": "A"}
    for path in ("/a/wrong", "/a/wrong/1", "/o/wrong", f"/o/{anna.token}", f"/a/{'é' * 32}"):
        answer = anna.client.get(path)
        assert answer.status_code == 403, path
        assert "personal link" in answer.text
    assert anna.client.post("/a/wrong/1", data=form).status_code == 403
    assert anna.client.get(f"/a/{campaign.info.owner}").status_code == 403
    for path in ("/", "/a", "/votes", "/static/../study.sqlite", "/static/"):
        assert anna.client.get(path).status_code == 404
    assert anna.client.get(f"{anna.home}/7").status_code == 404
    assert anna.client.get(f"{anna.home}/0").status_code == 404
    assert anna.client.put(f"{anna.home}/1", data=form).status_code == 405
    assert campaign.votes() == []


def test_large_and_foreign_bodies_are_refused(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path)
    anna = Visitor(campaign)
    form = anna.fields(1) | {"choice": "A"}
    address = f"{anna.home}/1"
    assert anna.client.post(address, data=form | {"more": "x" * 5000}).status_code == 413
    assert anna.client.post(address, json=form).status_code == 415
    many = "&".join(f"a{n}=1" for n in range(100))
    plain = {"Content-Type": "application/x-www-form-urlencoded"}
    assert anna.client.post(address, content=many, headers=plain).status_code == 403
    assert campaign.votes() == []


def test_hostile_text_is_text(tmp_path: Path) -> None:
    own = [
        item_of(f"\n\nHuman: {text}\n\nAssistant:", text, f"other {n}")
        for n, text in enumerate(HOSTILE)
    ]
    campaign = new_campaign(tmp_path, own=own)
    anna = Visitor(campaign)
    for number, item in enumerate(display_order(campaign.items, 0, "anna"), 1):
        page = anna.page(number)
        assert page.count("<script") == 1
        assert page.count("<button") == 3
        assert page.count("<form") == 1
        assert "<img" not in page
        assert page.count("<h1") == 1
        assert item.answer_a in anna.answers(number)
        assert item.answer_a in unescape(page.split('class="turns"')[1].split("</ol>")[0])


def test_characters_that_act_are_shown_as_signs(tmp_path: Path) -> None:
    acting = "abc \u202egnp.exe\u2066 \x00\x1b[31m \u200b end"
    campaign = new_campaign(tmp_path, own=[item_of("Hi", acting, "plain")])
    anna = Visitor(campaign)
    page = anna.page(1)
    assert not re.search("[\u202e\u2066\x00\x1b\u200b]", page)
    assert "abc ⟨U+202E⟩gnp.exe⟨U+2066⟩ ␀␛[31m ⟨U+200B⟩ end" in page
    anna.vote(1, "A")
    # What is stored and exported stays what the model wrote.
    assert campaign.items[0].answer_a == acting
    assert display_side(0, campaign.items[0].id, "anna") == campaign.votes()[0].side


def test_nothing_may_run_or_be_loaded_but_our_own(tmp_path: Path) -> None:
    anna = Visitor(new_campaign(tmp_path))
    for path in (anna.home, f"{anna.home}/1", "/a/wrong", "/nothing", "/static/page.js"):
        headers = anna.client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "set-cookie" not in headers
    page = anna.page(1)
    assert not re.search(r"\son\w+=|style=|javascript:", page)


def test_the_owner_sees_results_as_they_come(tmp_path: Path) -> None:
    campaign = new_campaign(tmp_path, count=4)
    anna = Visitor(campaign)
    address = f"/o/{campaign.info.owner}"
    assert "none judged yet" in anna.client.get(address).text
    for number in range(1, 5):
        second = 0 if anna.answers(number)[0].startswith("second") else 1
        anna.vote(number, "AB"[second] if number < 4 else "Tie")
    page = anna.client.get(address).text
    assert re.search(r"PPO better</th><td>3 \(75.0 %\)", page)
    assert re.search(r"Exact sign test</th><td>p = 0.25,", page)  # 2 / 2^3
    assert re.search(r"Ties as half</th><td>0.875 ", page)  # (3 + 1/2) / 4
    assert "4 of 4" in page
    assert 'aria-label="PPO better: 3. Tie: 1. SFT better: 0. "' in page
