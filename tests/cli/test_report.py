"""The report: self-contained, valid, readable without some or all of the record's parts."""

import base64
import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

from nbl_cli import report

VOID = {"meta", "source", "img", "br"}
DENSE = {
    "layers": [],
    "perplexity": 14.8,
    "kv_bytes_per_token": 6144,
    "prefill": 2e4,
    "decode": 330,
}
RECORD = {
    "nbl_report": 1,
    "command": "compress",
    "date": "2025-01-01 12:00",
    "seconds": 12.3,
    "model": {"name": "some/model", "type": "llama", "layers": 4, "parameters": 3_600_000},
    "conditions": {"torch": "2.13", "device": "CPU", "threads": 2},
    "calibration": {"text": ["book.txt"], "tokens": 131072, "features": "post-norm"},
    "scores": {
        "loss": [0.3, 0.1, 0.02, 0.01],
        "residual": [0.3, 0.1, 0.02, 0.01],
        "cca": [30.0, 1.0, 20.0, None],
        "nmse": [0.5, 0.2, 0.4, 0.3],
        "cosine": [0.4, 0.3, 0.2, 0.1],
    },
    "choice": {"method": "nbl", "criterion": "loss", "layers": [3, 2], "ridge_used": {"3": 1e-4}},
    "points": [
        DENSE,
        *(
            {
                "layers": [3, 2][:m],
                "perplexity": 14.8 + m,
                "kv_bytes_per_token": 6144 - 1536 * m,
                "prefill": 2e4 + m,
                "decode": 330.5 + m,
                "drop": {"layers": [3], "perplexity": 16.0 + m},
                "drop_same": {"layers": [3], "perplexity": 17.0 + m},
            }
            for m in (1, 2)
        ),
    ],
    "evaluation": {"text": ["held out"], "tokens": 4096},
    "speed": {"prompt_tokens": 224, "new_tokens": 32, "repetitions": 5},
    "samples": {"prompt": "def f", "continuations": {"dense": "a\nb", "NBL-2": "a\nc"}},
    "notes": ["cca and loss disagree"],
}
PARTS = [key for key in RECORD if key not in ("nbl_report", "command")]


class Page(HTMLParser):
    """Fails on a tag that is not closed, or in the wrong order; keeps attributes and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.attributes, self.text = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *attribute) for attribute in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> where {self.open} is open"

    def handle_data(self, data):
        self.text.append(data)


def links(page):
    return [
        value
        for _, name, value in page.attributes
        if name in ("src", "srcset", "href", "action", "data", "poster", "background")
    ]


def test_the_page_is_valid_and_needs_nothing_else():
    html = report.render_html(RECORD)
    page = Page(html)
    assert html.startswith("<!doctype html>") and ("html", "lang", "en") in page.attributes
    assert len(links(page)) == 8  # four plots, light and dark
    for link in links(page):
        kind, _, data = link.partition("base64,")
        assert kind == "data:image/svg+xml;"
        svg = ElementTree.fromstring(base64.b64decode(data))
        for element in svg.iter():
            for name, value in element.attrib.items():
                assert not name.endswith("href") or value.startswith("#")
                assert "url(" not in value or "url(#" in value
    rest = re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", html)
    for forbidden in ("http:", "https:", "//", "<script", "<link", "<iframe", "@import", "url("):
        assert forbidden not in rest.lower()
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_the_page_shows_what_was_measured():
    text = " ".join(Page(report.render_html(RECORD)).text)
    for shown in (
        "some/model",
        "16.80",
        "dropping: 18.00",
        "3,072",
        "−50%",
        "14.80",
        "131,072",
        "cca and loss disagree",
        "NBL-2",
        "3, 2",
        "def f",
        "2025-01-01",
        "2.13",
    ):
        assert shown in text
    assert "Not " not in text


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", ["missing", None, "text", 3, [], {}, ["x", 1], {"layers": "x"}])
def test_a_missing_or_mangled_part_is_no_crash(part, value):
    record = copy.deepcopy(RECORD)
    record[part] = value
    if value == "missing":
        del record[part]
    light_only(record)


def light_only(record):
    """The page without the plots, which take all the time, and the plots' own checks apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_plot", lambda draw, record, theme, kind: b"<svg/>")
        Page(report.render_html(record))


def test_plots_of_mangled_numbers():
    record = copy.deepcopy(RECORD)
    record["scores"] = {"cca": [None, "x", float("nan"), 2.0], "nmse": []}
    record["points"] = [
        {"layers": []},
        {"layers": [1], "perplexity": None, "prefill": "x"},
        5,
        {"layers": [1, 2], "kv_bytes_per_token": 0, "perplexity": float("inf")},
    ]
    assert set(report.render_png(record)) == {"error_per_layer.png"}
    text = " ".join(Page(report.render_html(record)).text)
    assert "Not measured in this run" in text
    record["points"] = [DENSE | {"kv_bytes_per_token": 0}, DENSE | {"layers": [1]}]
    Page(report.render_html(record))


def test_nothing_is_there():
    text = " ".join(Page(report.render_html({"nbl_report": 1, "command": "calibrate"})).text)
    assert text.count("Not ") == 5
    assert report.render_png({}) == {}


def test_everything_is_escaped():
    evil = '"><script>alert(1)</script><img src=x onerror=y>&'
    record = json.loads(json.dumps(RECORD).replace("some/model", json.dumps(evil)[1:-1]))
    record["notes"] = [evil]
    record["date"] = record["command"] = evil
    record["conditions"] = {evil: evil}
    record["scores"] = {evil: [0.1, 0.2], **record["scores"]}
    record["choice"] |= {"criterion": evil, "layers": [3, evil]}
    record["samples"] = {"prompt": evil, "continuations": {evil: evil}}
    record["model"]["type"] = evil
    record["points"][1]["layers"] = [evil]
    html = report.render_html(record)
    Page(html)
    assert "<script" not in html and "<img src=x" not in html and "&lt;script&gt;" in html


def test_dropped_models_are_called_so():
    record = copy.deepcopy(RECORD)
    record["choice"]["method"] = "drop"
    text = " ".join(Page(report.render_html(record)).text)
    assert "2 attention layers dropped" in text and "drop-2" in text and "NBL: 16.80" in text


def test_png_plots():
    images = report.render_png(RECORD)
    assert set(images) == {"error_per_layer.png", "perplexity.png", "kv_cache.png", "speed.png"}
    assert all(image.startswith(b"\x89PNG") for image in images.values())


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "has no nbl_report.json"),
        ("{", "expected JSON"),
        ("[]", "version 1"),
        ('{"nbl_report": 2}', "version 1"),
    ],
)
def test_a_folder_without_a_record_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / report.RECORD).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        report.read_record(tmp_path)
