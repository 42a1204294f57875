"""What the page of app.py says: an answer, a refusal, the footer; its looks, and what the browser does by itself."""

import html

from evaluation.model_card import WARNING
from evaluation.predictor import Prediction, percent

SHOWN = 5  # names told of a photo
START = "<p class='quiet'>The name appears here.</p>"
CSS = """
.gradio-container { max-width: 60rem !important; margin: 0 auto !important; }
.html-container { padding: 0 !important; }
h1, h2, .quiet, #answer p { margin: 0 !important; }
h1, h2 { font-size: 1.6rem; line-height: 1.25; }
.quiet, #foot { color: color-mix(in srgb, var(--body-text-color) 75%, transparent); }
#photo { height: 22rem !important; }
#photo img { width: 100%; height: 100%; object-fit: contain; }
#photo .source-selection button { width: 2.5rem; height: 2.5rem; padding: .6rem; }
#photo .source-selection button:not(.selected) { color: var(--body-text-color); }
#answer { min-height: 22rem; padding: 1rem; }
#answer { border: 1px solid var(--border-color-primary) !important; border-radius: var(--block-radius); }
#answer h2, #answer p, #answer li { overflow-wrap: anywhere; }
#answer ol { list-style: none; margin: 1.25rem 0 0; padding: 0; }
#answer li { display: grid; grid-template-columns: 1fr auto; gap: .25rem 1rem; margin: 0 0 .8rem; }
#answer li:first-child { font-weight: 600; }
#answer b { font-weight: inherit; font-variant-numeric: tabular-nums; }
#answer span { grid-column: 1 / 3; height: .5rem; border-radius: .25rem; background: var(--border-color-primary); }
#answer span span { display: block; background: var(--color-accent); }
#foot { border-top: 1px solid var(--border-color-primary); padding-top: 1rem; font-size: .9rem; }
#foot p, #foot details { margin: 0 0 .5rem; }
#foot strong { color: var(--body-text-color); }
footer { display: none !important; }
@media (max-width: 40rem) { #photo { height: 16rem !important; } #answer { min-height: 0; } }
"""
# A file dropped or pasted anywhere is the photo. The box itself takes only what the browser calls an image, and says so
# in words of its own or not at all: it is told that every file is one, so that the answer to it is open_image's.
HEAD = """<script>
addEventListener("dragover", event => event.preventDefault());
for (const kind of ["change", "drop", "paste"]) addEventListener(kind, event => {
    const file = (event.dataTransfer ?? event.clipboardData ?? event.target).files?.[0];
    const input = document.querySelector("#photo input[type=file]");
    const isImage = file?.type.startsWith("image/");
    if (!file || !input || (kind === "change" && isImage)) return;
    event.preventDefault();
    event.stopPropagation();
    const nothing = new DragEvent("drop", {bubbles: true, dataTransfer: new DataTransfer()});
    if (kind === "drop") event.target.dispatchEvent(nothing);  // else the box goes on waiting for it
    const files = new DataTransfer();
    files.items.add(isImage ? file : new File([file], file.name, {type: "image/jpeg"}));
    input.files = files.files;
    input.dispatchEvent(new Event("change", {bubbles: true}));
}, true);
</script>"""


def as_answer(found: Prediction) -> str:
    """Names come from folders of ood, so all are escaped; a bar is as long as its share of the whole."""
    told = [(html.escape(name), html.escape(percent(share)), share) for name, share in found.likeliest[:SHOWN]]
    name, confidence, _ = told[0]
    head = f"<h2>{name}</h2><p class='quiet'>{confidence} sure</p>"
    if not found.is_confident:
        head = f"<h2>Not sure</h2><p class='quiet'>Perhaps {name}, but {confidence} is not enough to say so.</p>"
    bars = [
        f"<li>{name} <b>{text}</b><span><span style='width:{share:.1%}'></span></span></li>"
        for name, text, share in told
    ]
    return f"<div role='status'>{head}<ol>{''.join(bars)}</ol></div>"


def as_refusal(reason: str) -> str:
    return f"<div role='alert'><h2>No name for this file</h2><p>{html.escape(reason)}.</p></div>"


def as_footer(run: str, names: list[str], report: dict | None, is_calibrated: bool) -> str:
    """How good the run is, what it knows, and what it is not for."""
    told = [f"How often the run {run} is right was not measured."]
    if report is not None:
        low, high = map(percent, report["top1_interval"])
        told = [
            f"The run {run} was right on {percent(report['top1'])} of {report['n']:,} photos of {report['split']} "
            f"(95% interval {low} to {high})."
        ]
        if report["coverage"]:
            right = percent(report["selective_accuracy"])
            told += [f"It gave a name to {percent(report['answered'])} of them, and {right} of those were right."]
        elif report["coverage"] is not None:
            told += ["It was sure of none of them."]
        if report["split"] == "val":
            told += ["These photos chose its weights too; on others it may be right less often."]
    if is_calibrated:
        told += [f"Any plant but these {len(names):,} it takes for one of them, or it is not sure."]
    else:
        told += [f"Any plant but these {len(names):,} it takes for one of them; how sure it is was not put to a test."]
    known = f"<details><summary>The {len(names):,} it knows</summary>{html.escape(', '.join(names))}</details>"
    return f"<p>{html.escape(' '.join(told))}</p>{known}<p><strong>{WARNING}</strong></p>"
