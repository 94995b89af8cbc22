"""The page of a model before it is compiled."""

from __future__ import annotations

from kbitc.compiler import inspection


def test_a_model_has_a_page_before_it_is_compiled(check):
    seen = inspection.inspect("demo")
    html = seen.html()
    page = check(html)
    assert all(name in html for name in seen.program.weights)
    assert "nf4:64+dq" in page.text
