"""What every page is held against: nested tags, our own links alone, nothing fetched, a policy that says so."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

VOID = {"meta", "input", "br"}


class Checker(HTMLParser):
    """Fails on tags that do not nest; gathers text, ids and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.ids, self.links, self.text, self.tags, self.policies = [], [], [], [], Counter(), []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        for key, value in attrs:
            assert not key.startswith("on"), (tag, key)
            assert key != "style", "the policy lets no attribute style anything"
            if key == "id":
                self.ids.append(value)
            if key in ("href", "src"):
                self.links.append(value)
        if dict(attrs).get("http-equiv") == "Content-Security-Policy":
            assert self.open == ["html", "head"]
            assert not {"style", "script"} & set(self.tags), "the policy holds for what stands after it"
            self.policies.append(
                dict(part.strip().split(" ", 1) for part in dict(attrs)["content"].split(";"))
            )
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


def digest_of(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def check_page(html):
    """A valid page that fetches nothing."""
    page = Checker(html)
    assert len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert not re.search(r"https?:|//|@import|url\(", html.partition("</style>")[2].partition("<script>")[0])
    assert "http" not in html.replace("http-equiv", "")
    (policy,) = page.policies
    script = policy.pop("script-src", None)
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    assert policy == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "style-src": f"'sha256-{digest_of(style)}'",
    }
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert [script] == [f"'sha256-{digest_of(text)}'" for text in scripts] or (script is None and not scripts)
    assert page.tags["script"] == len(scripts) <= 1
    return page


@pytest.fixture(scope="session")
def check():
    return check_page


@pytest.fixture(scope="session")
def evil():
    """A module's name that would end a tag, an attribute and a template's expression."""
    return "<script>alert(1)</script>'\"{0}{{7*7}}{% raw %}"
