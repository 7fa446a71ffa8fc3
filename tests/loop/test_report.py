from __future__ import annotations

import copy
import re
from html.parser import HTMLParser

import pytest

from corrigible.loop.plots import win_rate_plot
from corrigible.loop.report import _examples, render_report

RATE = {"value": 0.62, "low": 0.54, "high": 0.7, "n": 80}
POLICY = {
    "id": "0190",
    "name": "demo-v2",
    "weights": "ab" * 32,
    "trained_on": {"feedback": 90, "feedback_digest": "cd" * 32},
}
TURN = {
    "title": "One turn",
    "created_at": "2026-01-01 00:00 UTC",
    "seconds": 100.0,
    "peak_rss_mb": 2000.0,
    "store": "runs/demo/store.db",
    "settings": {"seed": 0},
    "versions": {"torch": "x"},
    "machine": {"cpus": 2},
    "gate": {"min_win_rate": 0.5},
    "verdict": {
        "decision": "promote",
        "checks": [{"name": "win rate", "passed": True, "detail": "clears it"}],
    },
    "policies": {"start": {**POLICY, "name": "demo-v1"}, "candidate": POLICY},
    "panel": [
        {
            "name": "ada",
            "judgements": 10,
            "reliability": 0.9,
            "position_bias": 0.1,
            "length_bias": 0.0,
            "agreement": 0.8,
            "first_shown": 0.5,
        }
    ],
    "reward": {
        "accuracy": RATE,
        "baselines": [{"name": "length", **RATE}],
        "calibration": [{"stated": 0.7, "observed": 0.68, "n": 40}],
        "ece": 0.03,
    },
    "training": {"steps": [1, 2, 3], "loss": [0.69, 0.6, 0.5], "margin": [0.0, 0.1, 0.2]},
    "stages": [{"name": "act", "summary": "10 answers", "seconds": 3.0}],
    "evaluation": {
        "win_rate": RATE,
        "gold_win_rate": RATE,
        "proxy_win_rate": RATE,
        "kl": {"value": 4.0, "low": 3.0, "high": 5.0},
        "length": {"start": 50.0, "candidate": 40.0},
        "table": [
            {"name": "gold", "start": 0.5, "candidate": 0.6, "difference": 0.1, "low": 0.05, "high": 0.15}
        ],
        "prompts": [
            {
                "prompt": f"<script>alert({i})</script>?",
                "topic": "t",
                "start": "old & <b>bold</b>",
                "candidate": "new",
                "gold_start": 0.1 * i,
                "gold_candidate": 0.5,
                "proxy_start": 0.0,
                "proxy_candidate": 1.0,
            }
            for i in range(12)
        ],
    },
}


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href") and value]


def test_the_page_stands_alone_and_escapes_what_models_said():
    html = render_report(TURN)
    page = Page()
    page.feed(html)
    assert page.tags.count("svg") == 7
    assert "script" not in page.tags and "&lt;script&gt;" in html
    assert not [link for link in page.links if not link.startswith("#")], "nothing is loaded from elsewhere"
    assert "Promoted" in html and "old &amp; &lt;b&gt;" in html


def test_ids_of_the_figures_do_not_collide():
    ids = re.findall(r'\bid="([^"]+)"', render_report(TURN))
    assert ids and len(ids) == len(set(ids))


def test_a_refusal_looks_like_one():
    turn = copy.deepcopy(TURN)
    turn["verdict"] = {
        "decision": "refuse",
        "checks": [{"name": "x", "passed": False, "detail": "too close"}],
    }
    html = render_report(turn)
    assert "Not promoted" in html and "too close" in html


def test_the_same_turn_gives_the_same_page():
    assert render_report(TURN) == render_report(TURN)


def test_examples_are_spread_from_win_to_loss():
    shown = _examples(TURN["evaluation"]["prompts"], count=5)
    change = [p["gold_candidate"] - p["gold_start"] for p in shown]
    assert change == sorted(change, reverse=True)
    assert change[0] == pytest.approx(0.5) and change[-1] == pytest.approx(0.5 - 1.1)


def test_plots_take_the_colour_of_the_page():
    svg = win_rate_plot([("a", 0.5, 0.4, 0.6)], 0.5)
    assert "currentColor" in svg and "#010203" not in svg


def test_one_prompt_gives_no_interval_on_the_page():
    turn = copy.deepcopy(TURN)
    turn["evaluation"]["kl"] |= {"low": None, "high": None}
    turn["evaluation"]["table"][0] |= {"low": None, "high": None}
    page = render_report(turn)
    assert "nats an answer from the start, one prompt: no interval" in page
    assert "+0.100 (one prompt: no interval)" in page
    assert "one prompt" not in render_report(TURN)
