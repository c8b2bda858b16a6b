"""Small campaigns, and a client that reads their pages as a browser without scripts would."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

from starlette.testclient import TestClient

from rlhf_exp.annotation.campaign import INSTRUCTIONS, Campaign, CampaignInfo, Item, item_of
from rlhf_exp.annotation.web import make_app

_FIELD = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')


def items(count: int) -> list[Item]:
    """Return different items; model a's answers begin with `first`, model b's with `second`."""
    return [
        item_of(f"\n\nHuman: Question {n}?\n\nAssistant:", f"first {n}", f"second {n}")
        for n in range(count)
    ]


def new_campaign(
    folder: Path,
    count: int = 6,
    criteria: tuple[str, ...] = ("overall",),
    names: tuple[str, ...] = ("anna", "ben"),
    *,
    collect: bool = False,
    identical: int = 0,
    own: list[Item] | None = None,
) -> Campaign:
    """Return a new campaign of plain items, or of your own."""
    info = CampaignInfo(
        source="eval/0123456789abcdef",
        name_a="SFT",
        name_b="PPO",
        collect=collect,
        criteria=criteria,
        instructions=INSTRUCTIONS,
        identical=identical,
    )
    campaign = Campaign.create(folder / "study.sqlite", info, own or items(count))
    campaign.invite(names)
    return campaign


class Visitor:
    """One annotator at the pages of a campaign."""

    def __init__(self, campaign: Campaign, name: str = "anna") -> None:
        self.campaign = campaign
        (self.token,) = (one.token for one in campaign.annotators() if one.name == name)
        self.client = TestClient(make_app(campaign), follow_redirects=False)
        self.home = f"/a/{self.token}"

    def page(self, number: int | None = None) -> str:
        """Return the text of the start page, or of a question's."""
        answer = self.client.get(self.home if number is None else f"{self.home}/{number}")
        assert answer.status_code == 200, answer.text
        return answer.text

    def fields(self, number: int, criterion: str = "overall") -> dict[str, str]:
        """Return the hidden fields of a question's form."""
        forms = self.page(number).split("<form")[1:]
        found = [dict(_FIELD.findall(form)) for form in forms]
        (fields,) = (one for one in found if one["criterion"] == criterion)
        return fields

    def vote(self, number: int, choice: str, criterion: str = "overall") -> tuple[int, str]:
        """Answer a question; return the status and the address that follows."""
        body = self.fields(number, criterion) | {"choice": choice}
        answer = self.client.post(f"{self.home}/{number}", data=body)
        return answer.status_code, answer.headers.get("location", "").removeprefix(self.home)

    def answers(self, number: int) -> list[str]:
        """Return the answers as shown, A and B."""
        pattern = r'role="group" aria-labelledby="answer-\d"\s*>(.*?)</div>'
        shown = re.findall(pattern, self.page(number), re.S)
        return [unescape(text) for text in shown]
