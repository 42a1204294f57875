"""A web page that gives the name of the plant in a photo, by a run that train.py made.

    pip install -r requirements-app.txt
    python app.py runs/default                   the page, for this machine alone, at http://127.0.0.1:7860
    python app.py runs/default --open true       shown in the browser at once
    python app.py runs/default --host 0.0.0.0    for the whole network: whoever reaches it may use it

Drop or paste a photo, or take one. Photos are classified one by one, kept for an hour, and sent nowhere.
"""

import base64
import contextlib
import io
import ipaddress
import os
import re
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from config.cli import COMPUTE_FIELDS, parse_run_command
from config.training_config import ConfigError, option
from runtime.run_dir import Run
from utils.logging_utils import UserError, logger, printable, report_errors, set_environment, setup_logging

WEB = Path(__file__).parent / "web"
MAX_UPLOAD = "20mb"
UPLOADS_KEPT_S = 3600
MAX_QUEUE = 20  # photos; whoever sends the next one is asked to come back
SHOWN = 5  # names of an answer
SMALL_SIDE = 640  # pixels of a photo that the answer brings
BROWSERS_SHOW = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP")  # Pillow's names of what each browser shows by itself


@dataclass(frozen=True)
class PageOptions:
    host: str = option("127.0.0.1", "0.0.0.0 serves the page to the whole network")
    port: int = option(7860, "of the page; 0: any free port", low=0, high=65535)
    open: bool = option(False, "open the page in this machine's browser")


def main(argv: list[str] | None = None) -> int:
    run, _, options = parse_run_command(argv, __doc__, PageOptions, COMPUTE_FIELDS, Run.load)
    set_environment()
    setup_logging()
    with report_errors(ConfigError, when_interrupted="the page is closed"), contextlib.ExitStack() as stack:
        # gradio's own folder is shared by all users
        os.environ["GRADIO_TEMP_DIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="llava_plants_"))
        try:
            import gradio  # noqa: F401  tell at once if it is missing
        except ImportError as error:
            raise UserError(f"the page needs gradio ({error}): pip install -r requirements-app.txt") from error
        options = replace(options, port=find_port(options.host, options.port))
        from evaluation.predictor import load_predictor

        serve(build_page(load_predictor(run), run), options)
    return 0


def find_port(host: str, port: int) -> int:
    """The port if it is free; of 0 a free one. Before the model is loaded, which can take a minute."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one just closed counts as free
            probe.bind(address)
            return probe.getsockname()[1]
    except (OSError, UnicodeError) as error:  # UnicodeError: a host with an empty or endless part
        reason = getattr(error, "strerror", None) or error
        advice = "name another --port (0: a free one), or the --host 127.0.0.1 or 0.0.0.0"
        raise UserError(f"--host {host} --port {port}: the page cannot be shown there ({reason}); {advice}") from error


def load_texts():
    """The macros of web/page.html.j2: header, start, answer, refusal, footer."""
    from evaluation.predictor import list_names, percent
    from evaluation.report import open_templates

    templates = open_templates(WEB, is_html=True)
    templates.filters |= {"percent": percent, "names": list_names}
    return templates.get_template("page.html.j2").module


def build_page(predictor, run: Run):
    import gradio as gr

    from evaluation.model_card import WARNING, read_reports
    from evaluation.report import EXAMPLES_FOLDER

    # gradio would decode photos itself, without the limits and the sentences of open_image. Set on the class: for a
    # subclass gradio writes a .pyi file beside this one, and an instance it copies.
    gr.Image.preprocess = lambda self, upload: upload and upload.path and (upload.path, upload.orig_name)
    names, texts = run.class_names, load_texts()
    reports = read_reports(run.folder, run.describe_weights(), run.config.dataset)
    report = reports.get("test", reports.get("val"))
    foot = texts.footer(run.folder.resolve().name, names, report, predictor.calibration is not None, WARNING)
    with gr.Blocks(title="LLaVA Plants", analytics_enabled=False, delete_cache=(60, UPLOADS_KEPT_S)) as page:
        gr.HTML(texts.header(len(names)))
        with gr.Row():
            with gr.Column():
                photo = gr.Image(
                    sources=["upload", "webcam", "clipboard"],
                    label="Photo",
                    alt_text="the photo",
                    placeholder="Drop or paste a photo\nor click to choose one",
                    buttons=[],
                    elem_id="photo",
                )
            with gr.Column():
                answer = gr.HTML(texts.start(), elem_id="answer")
        # Of two photos in quick succession the later one's name stays. photo.change would come twice for some.
        event = {"fn": partial(answer_to, predictor, texts), "inputs": photo, "outputs": answer}
        event |= {"trigger_mode": "always_last", "concurrency_id": "model", "api_visibility": "private"}
        gr.on([photo.input, photo.clear], **event)
        examples = find_examples(run.folder.resolve() / EXAMPLES_FOLDER)
        if examples:
            shown = gr.Examples(examples, photo, label="Photos to try, not trained on", api_visibility="private")
            shown.load_input_event.then(**event)
        gr.HTML(foot, elem_id="foot")
    return page.queue(default_concurrency_limit=1, max_size=MAX_QUEUE)


def find_examples(folder: Path) -> list[str]:
    """The images of a run's own folder. gradio serves what a link points at, and a run from elsewhere may hold any."""
    paths = sorted(map(str, folder.glob("*.jpg")))
    return [path for path in paths if os.path.realpath(path) == path and os.path.isfile(path)]


class KnownHosts:
    """Refuses requests for other names than this page's: by DNS rebinding a site could read it under its own.

    A name cannot be rebound to look like an address, so those are taken as they are.
    """

    def __init__(self, app, host: str):
        self.app = app
        self.names = {"localhost", host, socket.gethostname().lower()}

    async def __call__(self, scope, receive, send) -> None:
        from starlette.responses import PlainTextResponse

        host = dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1").lower()
        if scope["type"] in ("http", "websocket") and not self.is_known(host):
            text = "This page is not served under that name; use its address, or start it with --host NAME.\n"
            await PlainTextResponse(text, status_code=400)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def is_known(self, host: str) -> bool:
        """Whether a Host header, such as "localhost:7860" or "[::1]:7860", is one of this page's."""
        name = re.sub(r":\d*$", "", host).strip("[]")
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name in self.names


def serve(page, options: PageOptions) -> None:
    """Until Ctrl-C or SIGTERM."""
    import gradio as gr
    from starlette.middleware import Middleware

    hosts = Middleware(KnownHosts, host=options.host.lower())
    # gradio asks itself whether it runs, and would send that through a proxy
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{direct},localhost,{options.host}"
    font = ["system-ui", "sans-serif"]  # of the machine that shows the page
    _, address, _ = page.launch(
        server_name=f"[{options.host}]" if ":" in options.host else options.host,  # IPv6, as in addresses of pages
        server_port=options.port,
        inbrowser=options.open,
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        max_file_size=MAX_UPLOAD,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None, "middleware": [hosts]},
        theme=gr.themes.Default(primary_hue="emerald", secondary_hue="emerald", font=font, font_mono=["monospace"]),
        css_paths=WEB / "page.css",
        head=f"<script>{(WEB / 'page.js').read_text(encoding='utf-8')}</script>",
    )
    logger.info(f"page | {address} | Ctrl-C ends it")
    threading.Event().wait()


def answer_to(predictor, texts, upload: tuple[str, str | None] | None) -> str:
    """HTML for an upload, (path, its own name), or for None, after the photo was removed."""
    if upload is None:
        return texts.start()
    path, name = upload
    try:
        found = next(predictor.predict([path], SHOWN))
        small = "" if isinstance(found, str) else draw_small(path)
    except Exception:  # the page stays up, and an older photo's name must not stand beside this one
        logger.exception("a photo could not be classified")
        return texts.refusal("There is no name for this photo, since the program failed; its own output says why")
    if isinstance(found, str):  # it begins with the path, which is private
        return texts.refusal(found.replace(printable(path), printable(name or Path(path).name)))
    return texts.answer(found, SHOWN, small)


def draw_small(path: str) -> str:
    """The photo as the model sees it, in text for the page, if browsers do not show it: none but Safari shows HEIC."""
    from PIL import Image

    from utils.image_utils import open_thumbnail

    with Image.open(path) as header:
        if header.format in BROWSERS_SHOW:
            return ""
    file = io.BytesIO()
    open_thumbnail(path, SMALL_SIDE).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
