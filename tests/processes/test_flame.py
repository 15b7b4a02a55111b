"""The page with the flame graph in a real browser: opened from a disk, clicked, searched, walked by keyboard."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from browser import Page, browser
from headrace.profiling.finding import Finding
from headrace.profiling.record import Child, Frame, Machine, Record, Stack
from headrace.profiling.render import as_diff_html, as_html

HOSTILE = "</script><img src=http://example.com/x onerror=alert(1)>"
FRAMES = [
    Frame("<module>", "/app/main.py", 1),
    Frame("handle", "/app/main.py", 10),
    Frame("parse", "/app/parsing.py", 4),
    Frame("loads", "/usr/lib/python3.11/json/__init__.py", 299, "library"),
    Frame("<built-in method sum>", "~", 0, "builtin"),
    Frame("ask", "/app/agent.py", 80),
    Frame(HOSTILE, "/app/agent.py", 99),
]
RUN = Record(
    command="python main.py",
    directory="/app",
    started=1.0,
    pid=1,
    machine=Machine("abc", "a processor", 2, "Linux", "3.11"),
    wall_s=3.0,
    cpu_s=2.0,
    exit_status=0,
    frames=FRAMES,
    cpu=[
        Stack([0, 1, 2], [90, 12, 7], 0.75, 75, "MainThread"),
        Stack([0, 1, 2, 3], [90, 12, 8, 300], 0.5, 50, "MainThread"),
        Stack([0, 1, 4], [90, 14, 0], 0.25, 25, "MainThread"),
        Stack([1, 6], [1, 3], 0.25, 25, "pool_0"),
        Stack([1, 6], [1, 3], 0.25, 25, "pool_1"),
    ],
    waiting=[Stack([1, 5], [20, 88], 8.0, 80, f"Task-{number}", "socket") for number in range(5)],
    children=[
        Child(
            "python child.py",
            7,
            1.0,
            Record(
                command="python child.py",
                started=1.0,
                pid=7,
                machine=Machine("abc", "a processor", 2, "Linux", "3.11"),
                wall_s=1.0,
                cpu_s=1.0,
                frames=[Frame("in_child", "/app/child.py", 3)],
                cpu=[Stack([0], [4], 1.0, 100, "MainThread")],
            ),
        )
    ],
)
FINDING = Finding("hot", "warning", "`parse` is hot", "1.25 s of 2 s", "look at its lines", "/app/parsing.py", 7)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def opened(page: Page, folder: Path, content: str) -> Page:
    """The page read from a file, in a browser that has forgotten what went before."""
    file = folder / "page.html"
    file.write_text(content, encoding="utf-8")
    page.requests.clear()
    page.problems.clear()
    page.open(file.as_uri())
    return page


@pytest.fixture
def run(page: Page, tmp_path: Path) -> Page:
    return opened(page, tmp_path, as_html(RUN, [FINDING]))


def frame(name: str) -> str:
    return f'[data-name="{name}"]'


def names(page: Page) -> list[str]:
    return list(page.evaluate("[...document.querySelectorAll('[data-testid=frame]')].map(it => it.dataset.name)"))


def left_and_width(page: Page, name: str) -> list[float]:
    style = f"document.querySelector('{frame(name)}').style"
    return [float(value) for value in page.evaluate(f"[parseFloat({style}.left), parseFloat({style}.width)]")]


def test_it_asks_nobody_and_runs_nothing_that_is_not_its_own(run: Page, tmp_path: Path) -> None:
    run.evaluate("1")
    assert run.requests == [(tmp_path / "page.html").as_uri()]
    assert run.problems == []
    assert run.evaluate("document.images.length") == 0
    assert HOSTILE in names(run)


def test_findings_come_first_and_lead_into_the_graph(run: Page) -> None:
    text = run.text("finding")
    assert all(part in text for part in ("`parse` is hot", "1.25 s of 2 s", "look at its lines", "parsing.py:7"))
    order = "document.querySelector('[data-testid=finding]').compareDocumentPosition(document.querySelector('{}'))"
    assert run.evaluate(order.format("[data-testid=graph]")) == 4, "the graph follows"
    run.click("[data-testid=finding] button")
    assert run.evaluate("document.querySelector('[data-testid=search]').value") == "parse"
    assert run.text("matches") == "1 place, 1.25 s, 63 % of all"


def test_widths_are_shares_of_time_and_threads_of_a_pool_are_one(run: Page) -> None:
    assert left_and_width(run, "thread MainThread") == [0, 75]
    assert left_and_width(run, "2 threads pool") == [75, 25]
    assert left_and_width(run, "parse") == [0, 62.5]
    assert left_and_width(run, "loads") == [0, 25]


def test_what_is_called_lies_below_its_caller(run: Page) -> None:
    def box(name: str) -> list[float]:
        rectangle = f"document.querySelector('{frame(name)}').getBoundingClientRect()"
        return list(run.evaluate(f"(it => [it.left, it.right, it.top, it.bottom])({rectangle})"))

    for above, below in (("<module> main.py", "handle"), ("handle", "parse"), ("handle", "<built-in method sum>")):
        (left, right, _, bottom), (inner_left, inner_right, top, _) = box(above), box(below)
        assert top == pytest.approx(bottom, abs=0.5)
        assert left - 0.5 <= inner_left < inner_right <= right + 0.5


def test_a_click_zooms_in_and_the_trail_leads_back(run: Page) -> None:
    run.click(frame("parse"))
    assert names(run) == ["parse", "loads"]
    assert left_and_width(run, "loads") == [0, 40]
    assert run.text("trail") == "allthread MainThread<module> main.pyhandleparse"
    run.click("[data-testid=trail] button:nth-child(4)")
    assert "<built-in method sum>" in names(run)
    run.click("[data-testid=reset]")
    assert "2 threads pool" in names(run)


def test_the_pointer_gets_the_details(run: Page) -> None:
    run.hover(frame("parse"))
    text = run.text("details")
    assert "parsing.py:4" in text
    assert "1.25 s, 63 % of all; own 750 ms; seen 125 times" in text
    assert "was at line 7: 750 ms, line 8: 500 ms" in text


def test_search_marks_what_matches_and_adds_up_what_is_not_in_another_match(run: Page) -> None:
    run.click("[data-testid=search]")
    run.type("main.py")
    assert run.text("matches") == "3 places, 2.00 s, 100 % of all"
    marked = "[...document.querySelectorAll('.match')].map(it => it.dataset.name)"
    assert run.evaluate(marked) == ["<module> main.py", "handle", "handle"]
    run.evaluate("document.querySelector('[data-testid=search]').select()")
    run.type("loads")
    assert run.text("matches") == "1 place, 500 ms, 25 % of all"
    run.press("Enter")
    assert run.evaluate("document.activeElement.dataset.name") == "loads"


def test_waiting_is_a_graph_of_its_own(run: Page) -> None:
    run.click("[data-testid=show-waiting]")
    assert names(run) == ["all", "handle", "ask", "waits for: socket"]
    run.hover(frame("ask"))
    assert "40.0 s, 100 % of all" in run.text("details")
    assert "in 5: Task-0, Task-1, Task-2, …" in run.text("details")
    pressed = "document.querySelector('[data-testid=show-{}]').getAttribute('aria-pressed')"
    assert [run.evaluate(pressed.format(kind)) for kind in ("cpu", "waiting")] == ["false", "true"]
    run.click("[data-testid=show-cpu]")
    assert "parse" in names(run)


def test_a_child_process_has_its_graphs_too(run: Page) -> None:
    run.evaluate(
        "(() => { const it = document.querySelector('[data-testid=process]'); it.selectedIndex = 1;"
        "it.dispatchEvent(new Event('change')); })()"
    )
    assert names(run) == ["all", "in_child"]
    run.click("[data-testid=show-waiting]")
    assert "Nothing was seen waiting" in run.text("empty")
    assert run.evaluate("document.querySelector('[data-testid=canvas]').hidden")


def test_the_keyboard_does_all_of_it(run: Page) -> None:
    def here() -> Any:
        return run.evaluate("document.activeElement.dataset.name")

    run.evaluate("document.querySelector('[data-testid=frame][tabindex=\"0\"]').focus()")
    walked = []
    for key in ("ArrowDown", "ArrowRight", "ArrowLeft", "ArrowDown", "ArrowDown", "ArrowDown"):
        run.press(key)
        walked.append(here())
    assert walked == ["thread MainThread", "2 threads pool", "thread MainThread", "<module> main.py", "handle", "parse"]
    assert "parsing.py:4" in run.text("details")
    run.press("Enter")
    assert (names(run), here()) == (["parse", "loads"], "parse")
    run.press("Escape")
    assert left_and_width(run, "handle") == [0, 100]
    run.press("/")
    assert run.evaluate("document.activeElement.dataset.testid") == "search"


def test_light_and_dark_are_both_readable(run: Page) -> None:
    run.click("[data-testid=search]")
    run.type("loads")
    for scheme in ("light", "dark"):
        run.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        for part in (".frame.match", ".frame.user", ".frame.library", ".frame.builtin", ".details", ".place", "body"):
            colours = run.evaluate(
                f"(() => {{ const it = getComputedStyle(document.querySelector('{part}'));"
                "return [it.color, it.backgroundColor, getComputedStyle(document.body).backgroundColor]; })()"
            )
            assert contrast(colours[0], colours[1] if "0, 0, 0, 0" not in colours[1] else colours[2]) >= 4.5, part
    run.call("Emulation.setEmulatedMedia", features=[])


def contrast(one: str, other: str) -> float:
    """Of two colours, as the accessibility guidelines of the web count it."""

    def light(colour: str) -> float:
        parts = [float(each) / 255 for each in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((light(one), light(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_fifty_thousand_stacks_and_deep_ones_stay_a_page_that_can_be_used(page: Page, tmp_path: Path) -> None:
    draw = random.Random(1)
    frames = [Frame(f"function_{number}", f"/app/{number}.py", number + 1) for number in range(400)]
    deep = list(range(180))
    ways = [[0, *(draw.randrange(180, 400) for _ in range(12))] for _ in range(50_000)]
    ways += [[*deep, *(draw.randrange(180, 400) for _ in range(20))] for _ in range(500)]
    cpu = [Stack(way, [7] * len(way), 0.01 if len(way) < 100 else 1.0, 1, "MainThread") for way in ways]
    content = as_html(msgspec.structs.replace(RUN, frames=frames, cpu=cpu, waiting=[], children=[]), [])
    assert len(content) < 3_000_000
    opened(page, tmp_path, content)
    assert page.text("details").startswith("all1,000 s, 100 % of all")
    count = "document.querySelectorAll('[data-testid=frame]').length"
    assert 180 < page.evaluate(count) <= 4000
    assert "too narrow to be drawn" in page.text("hint")
    page.click(frame("function_170"))
    assert page.text("trail").endswith("function_170")
    assert left_and_width(page, "function_171") == [0, 100]
    page.press("Escape")
    assert page.text("trail").endswith("function_169")
    assert page.problems == []


def test_a_difference_is_coloured_by_what_takes_longer(page: Page, tmp_path: Path) -> None:
    cpu = [
        msgspec.structs.replace(stack, seconds=stack.seconds * (3 if stack.frames[-1] == 4 else 0.4))
        for stack in RUN.cpu
    ]
    after = msgspec.structs.replace(RUN, cpu=[*cpu, Stack([0, 5], [1, 2], 0.3, 30, "MainThread")], waiting=[])
    opened(page, tmp_path, as_diff_html(RUN, after, ["faster by 18 % [12, 23]"]))
    assert page.text("verdict").strip() == "faster by 18 % [12, 23]"
    classes = "document.querySelector('{}').className"
    assert "slower" in page.evaluate(classes.format(frame("<built-in method sum>")))
    assert "faster" in page.evaluate(classes.format(frame("loads")))
    page.hover(frame("loads"))
    assert "before 500 ms, after 200 ms: −300 ms, −60 %; −15 % of the whole before" in page.text("details")
    assert "ask" in names(page)
    page.click("[data-testid=show-before]")
    assert "ask" not in names(page), "it is new, and has no width before"
    page.click("[data-testid=show-waiting]")
    assert "ask" in names(page)
    page.hover(frame("ask"))
    assert "gone" in page.text("details")
    assert page.problems == []


def test_the_data_of_the_page_is_what_was_recorded(tmp_path: Path) -> None:
    content = as_html(RUN, [])
    text = content.partition('id="data">')[2].partition("</script>")[0]
    graphs = json.loads(text)["graphs"]
    assert [(each["kind"], bool(each["process"]), each["tree"]["total"][:1]) for each in graphs] == [
        ("cpu", False, [2.0]),
        ("waiting", False, [40.0]),
        ("cpu", True, [1.0]),
        ("waiting", True, []),
    ]
