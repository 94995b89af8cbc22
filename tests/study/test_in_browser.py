"""The page in a real headless browser: every plot renders, the table sorts, and no request leaves the machine."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time

import pytest

from kbitc.study.page import study_page

aiohttp = pytest.importorskip("aiohttp")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt install chromium)")

SEEN = """JSON.stringify({
  plots: [...document.querySelectorAll('svg.plot')].map(svg => {
    const drawn = [...svg.querySelectorAll('path,use')].map(e => e.getBoundingClientRect())
      .filter(box => box.width > 1 || box.height > 1).length;
    const texts = [...svg.querySelectorAll('text')].filter(e => e.getBoundingClientRect().width > 2).length;
    const strokes = new Set([...svg.querySelectorAll('path')].map(e => getComputedStyle(e).stroke));
    return {width: svg.getBoundingClientRect().width, drawn, texts, strokes: strokes.size};
  }),
  asked: performance.getEntriesByType('resource').map(entry => entry.name),
})"""
SORTED = """(() => {
  const table = [...document.querySelectorAll('table.sortable')].at(-1);
  const column = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.trim() === 'loss');
  table.tHead.rows[0].cells[column].querySelector('button').click();
  return JSON.stringify([...table.tBodies[0].rows].map(row => +row.cells[column].dataset.v));
})()"""


@pytest.fixture(scope="module")
def opened(rows, tmp_path_factory):
    """What the browser says of the page, and the network events meanwhile."""
    folder = tmp_path_factory.mktemp("browser")
    path = folder / "report.html"
    path.write_text(study_page([row for row in rows if row.block in (0, 64)])[0], "utf-8")
    arguments = [
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}", "about:blank",
    ]  # fmt: skip
    with open(folder / "log", "wb") as log:
        browser = subprocess.Popen([CHROMIUM, *arguments], stdout=log, stderr=log)
    try:
        yield asyncio.run(_look(folder / "profile" / "DevToolsActivePort", path.as_uri()))
    finally:
        browser.terminate()
        browser.wait(20)


async def _look(port_file, address):
    deadline = time.monotonic() + 60
    while not (port_file.exists() and port_file.read_text().strip()):
        assert time.monotonic() < deadline, "the browser did not start"
        await asyncio.sleep(0.2)
    port = port_file.read_text().split()[0]
    events, answers, number = [], {}, 0
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json") as reply:
            target = next(each for each in await reply.json() if each["type"] == "page")
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:

            async def call(method, **params):
                nonlocal number
                number += 1
                mine = number
                await socket.send_json({"id": mine, "method": method, "params": params})
                while mine not in answers:
                    message = json.loads((await asyncio.wait_for(socket.receive(), 60)).data)
                    if "id" in message:
                        answers[message["id"]] = message
                    else:
                        events.append(message)
                assert "error" not in answers[mine], answers[mine]
                return answers[mine]["result"]

            for domain in ("Network", "Page", "Log", "Runtime"):
                await call(f"{domain}.enable")
            await call("Page.navigate", url=address)
            while not any(event["method"] == "Page.loadEventFired" for event in events):
                await call("Runtime.evaluate", expression="1")
                await asyncio.sleep(0.1)
            seen = json.loads((await call("Runtime.evaluate", expression=SEEN))["result"]["value"])
            losses = json.loads((await call("Runtime.evaluate", expression=SORTED))["result"]["value"])
    return seen, losses, events, address


def test_every_plot_renders(opened):
    seen, _, _, _ = opened
    assert len(seen["plots"]) == 5
    for plot in seen["plots"]:
        assert plot["width"] > 400
        assert plot["drawn"] > 20
        assert plot["texts"] >= 10
        assert plot["strokes"] >= 5, "lines in the colours of the precisions, not all in one"


def test_no_request_leaves_the_machine(opened):
    seen, _, events, address = opened
    asked = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked == {address}
    assert seen["asked"] == []


def test_the_browser_complains_of_nothing(opened):
    _, _, events, _ = opened
    said = [e["params"]["entry"]["text"] for e in events if e["method"] == "Log.entryAdded"]
    said += [str(e["params"]) for e in events if e["method"] == "Runtime.exceptionThrown"]
    assert said == [], "the policy blocks nothing, and the script does not fail"


def test_the_table_sorts(opened):
    _, losses, _, _ = opened
    assert len(losses) > 100
    assert losses in (sorted(losses), sorted(losses, reverse=True))
