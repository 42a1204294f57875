"""Every file uses the field's standard terms: a word list, checked in names, strings, comments, docs and templates.

To check one file: `pytest tests/unit/test_vocabulary.py -k models/trainer.py`.
"""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT


class Rule(NamedTuple):
    words: str  # regular expression over lower-case words, "photo size" for `photo_size` and `PhotoSize`
    instead: str
    scope: str = "any"  # any: names and text | text: strings, comments, docs | name: one identifier, in full
    only: str = ""  # regular expression of the paths that the rule holds for
    allowed: str = "$^"  # regular expression of the paths that are exempt

    def find(self, text: str, is_name: bool) -> list[str]:
        """In what `words_of` gives."""
        if self.scope == "name":
            return [text] if is_name and re.fullmatch(self.words, text) else []
        if self.scope == "text" and is_name:
            return []
        return [found[0] for found in re.finditer(rf"(?<![a-z\d])(?:{self.words})(?![a-z\d])", text)]


WEB_DEMO = r"^web/|^tests/browser/|(^|_)app\.py$|^docs/own_images\.md$"

RULES = [
    # In the data room, where it is among the words that people use in names of folders and columns.
    Rule(r"(?<!in this )photos?(?!\.\w|/)", "image, sample", allowed=WEB_DEMO + r"|^data/(columns|labels|layout)"),
    Rule(r"(?<!model )cards?", "GPU; `model card`", allowed=r"model_card|^web/"),
    # training
    Rule(r"(images|photos|samples) at a time", "micro-batch"),
    Rule(r"(images|photos|samples) a step", "global batch size"),
    Rule(r"(go|goes|going|gone|went) on", "resume, continue"),
    Rule(r"unfinished|left unfinished", "interrupted, incomplete"),
    Rule(r"in halves|redone", "retry with half the micro-batch"),
    Rule(r"(images?|photos?|samples?|micro-?batch\w*|batch(es)?) (is|are) cut|cut (a|the) batch|the cut", "split"),
    Rule(r".*\bcut\b.*", "split", "name"),
    Rule(r"pieces?", "micro-batch, slice, part"),
    Rule(r"idle", "dummy", "text", only=r"^models/|^runtime/"),
    Rule(r"(what|whatever|nothing|all that) learns?|(weights|parameters|that) learns?|learning(?! (rate|step|curve))",
         "trainable parameters", allowed=r"^docs/|^README|\.j2$"),
    Rule(r"what learns|weights that learn", "trainable parameters"),
    Rule(r"choose trainables", "set_trainable"),
    Rule(r"untouched( (base|model|weights))?", "base model (zero-shot)"),
    Rule(r"model built here|built here", "randomly initialized model"),
    Rule(r"drawings?|drawn (flowers|images|ones|species)|few drawn", "synthetic images"),
    Rule(r"drawn", "synthetic images", "name"),
    Rule(r"made up", "backfilled"),
    Rule(r"step down", "halve_micro_batch", "name"),
    Rule(r"judge\w*( .*)?", "verify, handle_non_finite_step", "name"),
    Rule(r"(save|evaluate) here|train from", "save_now, evaluate_if_needed", "name"),
    # memory and kernels
    Rule(r"card room|fit to card", "available_gpu_memory, plan_memory"),
    Rule(r"held to", "limited to"),
    Rule(r"keeps? (their|its|the|all)? ?activations?|layers? recomputes?|layers? (run|runs|computed) again",
         "activation checkpointing in N layers"),
    Rule(r"(in|into|of) the host s memory", "activation offloading to CPU"),
    Rule(r"passing|kept layer", "transient, activation bytes", "name"),
    Rule(r"fixed|inputs", "static, checkpoint bytes", "name", only=r"memory\.py$"),
    Rule(r"(can )?unpack\w*", "dequantize", "name", only=r"^models/"),
    Rule(r"unpack(s|ed|ing)? (the |4|nf4|weights?|its|their)|the unpack\w*", "dequantize", only=r"^models/|^docs/"),
    Rule(r"matrix products?", "matmul"),
    Rule(r"product", "matmul", "name", only=r"^models/"),
    Rule(r"adapters? (s )?columns?", "LoRA columns"),
    Rule(r"(through|by) adapters|be plain|stays? plain|plain kernels?", "add_lora_grad, eager()"),
    Rule(r"park", "offload to pinned memory", "name"),
    # ranks
    Rule(r"(spread (the )?(frozen|weights)|(is|are|were) spread|spread over)", "shard (FSDP)", allowed=r"^web/"),
    Rule(r"spread", "fsdp_modules", "name", only=r"^(models|runtime)/"),
    Rule(r"gather weights|lets? (it|them|its|the weights)? ?go( again)?", "unshard, reshard"),
    Rule(r"let the oldest go", "rotate (save_total_limit)"),
    Rule(r"shared? out|sharing out", "distributed across ranks"),
    Rule(r"(all|other|the|several|number of|over|by|of|d) processes|the other process", "ranks",
         only=r"^(models|evaluation|runtime|data|README)"),
    Rule(r"the main one|the others", "rank 0; other ranks, images, layers ..."),
    Rule(r"share", "broadcast_object, ShardedBatchSampler", "name", only=r"^runtime/|ranks\.py$|^train\.py$"),
    Rule(r"share batches|sum gradients|check alike|main first|count processes", "see runtime/distributed.py"),
    Rule(r"give sign|gives? (a|its|no) sign|watch the watch|find silent|silent (process|rank|machine)\w*",
         "heartbeat, watchdog, stalled rank"),
    Rule(r"meet|processes (meet|met)|not all .{1,20} met", "rendezvous"),
    # data
    Rule(r"left out|out left", "skipped (unreadable image), excluded"),
    Rule(r"bad (images?|photos?|share)", "unreadable images"),
    Rule(r"(images|photos|samples|ones|that) that opens?|first that open", "readable"),
    Rule(r"twins?", "duplicate images across splits"),
    Rule(r"joiner", "response prefix"),
    Rule(r"end tokens?", "EOS or end-of-turn token"),
    Rule(r"hash ids|probe ids", "data_fingerprint, tokenizer_probe"),
    Rule(r"held out", "load_validation_rows", "name"),
    # evaluation
    Rule(r"naming|(could|can|cannot)( not)? be named|to name (a|an|the|this|its)? ?(images?|photos?|plants?)",
         "classification, predict"),
    Rule(r"(errors?|message|failure|line|it|that|which|config|model|run|manifest|checkpoint) names", "gives, lists"),
    Rule(r"named?r|named|build namer|assessor|name ?tree", "Predictor, Prediction, Evaluator, TokenTrie", "name"),
    Rule(r"named? (val |it )?best|names best|how often right", "best validation accuracy, top-1 accuracy"),
    Rule(r"(scoring|score|scores) all names|all names are scored", "closed-set log-likelihood scoring"),
    Rule(r"free (replies|reply|naming)", "generation"),
    Rule(r"sureness|how sure|(more|most|least|less) sure|never sure|sure enough", "confidence"),
    Rule(r"(is )?sure( .*)?", "confidence", "name"),
    Rule(r"(never|not|images|share|is|are) answered|answered precision|answered (images|share)", "abstain, coverage"),
    Rule(r"answered", "coverage", "name"),
    Rule(r"target precision", "target selective accuracy"),
    Rule(r"strangers?", "out-of-distribution (OOD) image; untrusted"),
    Rule(r"look ?alikes?|(is|are|it) taken for", "confusions", only=r"evaluat|plot|model_card|predict|app"),
    Rule(r"neutral (row|image|photo)", "content-free prior"),
    Rule(r"hits", "correct"),
    Rule(r"figures", "metrics"),
    # runs, checkpoints, exports
    Rule(r"claim(ed)?", "create_checkpoint_dir", "name"),
    Rule(r"branch(es)? off|begins? another run|beginning \S+ from|begins? a new run from", "fork from a checkpoint"),
    Rule(r"replacing|restore", "atomic_replace_dir", "name"),
    Rule(r"damaged?|damages|damaging|find damage|check whole", "corrupted"),
    Rule(r"proofs?|proved?|proves|proven|proving", "verification, verify"),
    Rule(r"drafted", "staging_dir"),
    Rule(r"hand (it|them|the model) on|handed on|hands on the", "export"),
    Rule(r"the page", "web demo", allowed=WEB_DEMO + r"|^docs/own_images|readme|page"),
    # English
    Rule(r"tells?( .*)?", "log_*", "name"),
    Rule(r"told", "logged, reported; `output`, `message`"),
    Rule(r"errors? told", "report_errors"),
    Rule(r"knobs?", "option, field"),
    Rule(r"one|own|the one|its own", "a noun: sample, image, layer, rank, message", "name"),
    Rule(r"\w*colour\w*|licen[c]e\w*|grey\w*|centre\w*|behaviou\w*|favour\w*|neighbou\w*|judgement|labelled|cancelled|"
         r"metres?|artefacts?|(initial|normal|recogn|organ|optim|quant|real|serial|util|general|summar)is(e|ed|es|ing|ation)",
         "American spelling"),
]  # fmt: skip

EXEMPT = {"runtime/legacy.py", "tests/unit/test_vocabulary.py", "CONTRIBUTING.md"}  # they show the old words
SUFFIXES = {".py", ".md", ".j2", ".js", ".css", ".html"}
FOLDERS = ("benchmarks", "config", "data", "docs", "evaluation", "models", "runtime", "tests", "utils", "web")
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*"))]
    if path.suffix in SUFFIXES and path.is_file()
)


class Passage(NamedTuple):
    line: int
    text: str
    is_name: bool


def words_of(text: str) -> str:
    """Lower-case words: `photo_size`, `PhotoSize` and "photo-size" alike are "photo size"."""
    text = re.sub(r"(?<=[a-z\d])(?=[A-Z])", " ", text)
    return re.sub(r"[\s_\-']+", " ", text).strip().lower()


def read_python(source: str) -> Iterator[Passage]:
    """The file's names, strings and comments; a comment over several lines is one passage."""
    comment: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if comment and token.start[0] != last + 1:
                yield Passage(first, " ".join(comment), False)
                comment = []
            first = token.start[0] if not comment else first
            comment.append(token.string.lstrip("#! "))
            last = token.start[0]
        elif token.type == tokenize.NAME:
            yield Passage(token.start[0], token.string, True)
        elif token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE":
            yield Passage(token.start[0], token.string, False)
    if comment:
        yield Passage(first, " ".join(comment), False)


def read_passages(path: str) -> Iterator[Passage]:
    source = (ROOT / path).read_text(encoding="utf-8")
    yield Passage(0, Path(path).stem, True)
    if path.endswith(".py"):
        yield from read_python(source)
        return
    if path == "README.md":  # a plant person reads this section
        source = re.sub(
            r"^## [^\n]*\bown\b.*?(?=^## )", lambda part: "\n" * part[0].count("\n"), source, flags=re.M | re.S
        )
    for found in re.finditer(r"(\S[^\n]*\n?)+", source):  # a paragraph: phrases are wrapped over its lines
        yield Passage(source.count("\n", 0, found.start()) + 1, found[0], False)


def find_problems(path: str) -> Iterator[str]:
    rules = [rule for rule in RULES if re.search(rule.only, path) and not re.search(rule.allowed, path)]
    likely = {False: any_of(rules, "name"), True: any_of(rules, "text")}
    known = set()  # names come again and again
    for passage in read_passages(path):
        key = words_of(passage.text), passage.is_name
        if key in known or not likely[passage.is_name].search(key[0]):
            known.add(key)
            continue
        for rule in rules:
            for found in rule.find(*key):
                yield f"{path}:{passage.line}: {found!r} in {passage.text.strip()[:60]!r}: use {rule.instead}"


def any_of(rules: list[Rule], other_scope: str) -> re.Pattern:
    """What at least one of the rules may find; 70 searches in each passage would take ten times as long."""
    words = "|".join(f"(?:{rule.words})" for rule in rules if rule.scope != other_scope)
    return re.compile(rf"(?<![a-z\d])(?:{words})(?![a-z\d])")


def test_files_use_standard_terms():
    problems = [problem for path in FILES if path not in EXEMPT for problem in find_problems(path)]
    assert not problems, "\n" + "\n".join(problems)


@pytest.mark.parametrize(
    ("text", "is_name", "problems"),
    [
        ("photo_size", True, 1),
        ("PhotoError", True, 1),
        ("the run\n    goes on", False, 1),
        ("graphics card", False, 1),
        ("image_size", True, 0),
        ("What type of object is in this photo?", False, 0),
        ("model_card", True, 0),
        ("the run resumes", False, 0),
    ],
)
def test_rules_find_what_they_are_for(text, is_name, problems):
    words = words_of(text)
    assert len([rule for rule in RULES if rule.find(words, is_name)]) == problems
    assert not problems or any_of(RULES, "text" if is_name else "name").search(words)
