"""A web page that gives the name of the plant in a photo, by a run that train.py made.

    pip install -r requirements-app.txt
    python app.py runs/default                   the page, for this machine alone, at http://127.0.0.1:7860
    python app.py runs/default --open true       shown in the browser at once
    python app.py runs/default --host 0.0.0.0    for the whole network: whoever reaches it may use it
    python app.py runs/default --no-page         the endpoint alone, for other programs: docs/endpoint.md

Drop or paste a photo, or take one, and more of the same plant. Photos are kept for an hour, and sent nowhere.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from config.cli import COMPUTE_FIELDS, parse_run_command
from config.training_config import ConfigError, option
from runtime.run_dir import Run
from utils.logging_utils import UserError, logger, report_errors, set_environment, setup_logging

WEB = Path(__file__).parent / "web"
UPLOADS_KEPT_S = 3600
SMALL_SIDE = 640  # pixels of a photo that the answer brings
BROWSERS_SHOW = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP")  # Pillow's names of what each browser shows by itself


@dataclass(frozen=True)
class PageOptions:
    host: str = option("127.0.0.1", "0.0.0.0 serves the page to the whole network")
    port: int = option(7860, "of the page; 0: any free port", low=0, high=65535)
    open: bool = option(False, "open the page in this machine's browser")
    no_page: bool = option(False, "serve the endpoint alone, without a page")

    def find_conflicts(self) -> Iterator[str]:
        if self.open and self.no_page:
            yield "open=true with no_page=true: there is no page to open; leave one out"


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
        from evaluation.endpoint import Endpoint
        from evaluation.predictor import load_predictor

        endpoint = Endpoint(load_predictor(run), run)
        serve(build_blocks(endpoint, None if options.no_page else run), endpoint, options)
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
    from evaluation.predictor import list_names
    from evaluation.report import open_templates, percent

    templates = open_templates(WEB, is_html=True)
    templates.filters |= {"percent": percent, "names": list_names}
    return templates.get_template("page.html.j2").module


def build_blocks(endpoint, run: Run | None):
    """What gradio serves: the endpoint for gradio_client, and the page of a run if there is one."""
    import gradio as gr

    from evaluation.endpoint import MAX_QUEUE

    # gradio would decode photos itself, without the limits and the sentences of open_image. Set on the classes: for a
    # subclass gradio writes a .pyi file beside this one, and an instance it copies.
    gr.Image.preprocess = lambda self, upload: upload and upload.path and read_upload(upload)
    gr.File.preprocess = lambda self, uploads: [read_upload(upload) for upload in uploads.root] if uploads else []
    with gr.Blocks(title="LLaVA Plants", analytics_enabled=False, delete_cache=(60, UPLOADS_KEPT_S)) as blocks:
        if run:
            build_page(endpoint, run)
        images = gr.File(file_count="multiple", visible=False, label="images")
        answer, ask = gr.JSON(visible=False, label="answer"), gr.Button(visible=False)
        ask.click(partial(answer_client, endpoint), images, answer, api_name="predict", concurrency_id="model")
    return blocks.queue(default_concurrency_limit=1, max_size=MAX_QUEUE)


def build_page(endpoint, run: Run) -> None:
    import gradio as gr

    from evaluation.model_card import WARNING, read_reports
    from evaluation.report import EXAMPLES_FOLDER

    names, texts = run.class_names, load_texts()
    reports = read_reports(run.folder, run.describe_weights(), run.config.dataset)
    report = reports.get("test", reports.get("val"))
    is_calibrated = endpoint.predictor.calibration is not None
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
    with gr.Row(elem_id="more"):
        others = gr.File(file_count="multiple", label="More photos of this plant, up to 4", elem_id="others", height=80)
        look = gr.Button("Where did it look?", elem_id="look")
    answer_page = partial(answer_to, endpoint, texts)
    # Of two photos in quick succession the later one's name stays. photo.change would come twice for some.
    event = {"trigger_mode": "always_last", "concurrency_id": "model", "api_visibility": "private"}
    first = event | {"fn": lambda photo: (answer_page(photo), None), "inputs": photo, "outputs": [answer, others]}
    both = event | {"inputs": [photo, others], "outputs": answer}
    gr.on([photo.input, photo.clear], **first)
    gr.on([others.upload, others.delete, others.clear], answer_page, **both)
    look.click(partial(answer_page, with_map=True), **both)
    examples = find_examples(run.folder.resolve() / EXAMPLES_FOLDER)
    if examples:
        shown = gr.Examples(examples, photo, label="Photos to try, not trained on", api_visibility="private")
        shown.load_input_event.then(**first)
    detects = endpoint.predictor.detector is not None
    gr.HTML(texts.footer(run.folder.resolve().name, names, report, is_calibrated, WARNING, detects), elem_id="foot")


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

        app, host = self.app, dict(scope.get("headers", ())).get(b"host", b"").decode("latin-1")
        if scope["type"] in ("http", "websocket") and not self.is_known(host):
            text = "This page is not served under that name; use its address, or start it with --host NAME.\n"
            app = PlainTextResponse(text, status_code=400)
        await app(scope, receive, send)

    def is_known(self, host: str) -> bool:
        """Whether a Host header, such as "localhost:7860" or "[::1]:7860", is one of this page's."""
        name = re.sub(r":\d*$", "", host.lower()).strip("[]")
        with contextlib.suppress(ValueError):
            return name in self.names or ipaddress.ip_address(name) is not None
        return False


def serve(blocks, endpoint, options: PageOptions) -> None:
    """Until Ctrl-C or SIGTERM."""
    import gradio as gr
    from starlette.middleware import Middleware

    from evaluation.endpoint import MAX_UPLOAD

    routes = endpoint.build_routes(is_alone=options.no_page)
    hosts = Middleware(KnownHosts, host=options.host.lower())
    # gradio asks itself whether it runs, and would send that through a proxy
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{direct},localhost,{options.host}"
    font = ["system-ui", "sans-serif"]  # of the machine that shows the page
    _, address, _ = blocks.launch(
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
        app_kwargs={"docs_url": None, "redoc_url": None, "openapi_url": None, "middleware": [hosts], "routes": routes},
        theme=gr.themes.Default(primary_hue="emerald", secondary_hue="emerald", font=font, font_mono=["monospace"]),
        css_paths=WEB / "page.css",
        head=f"<script>{(WEB / 'page.js').read_text(encoding='utf-8')}</script>",
    )
    logger.info(f"{'endpoint' if options.no_page else 'page'} | {address} | Ctrl-C ends it")
    threading.Event().wait()


def read_upload(upload) -> dict:
    """A photo as that of a row; under the sender's name for it, since its path here is private. Raises gr.Error."""
    try:
        return {"bytes": Path(upload.path).read_bytes(), "path": upload.orig_name or Path(upload.path).name}
    except FileNotFoundError as error:
        import gradio as gr

        text = "This photo was deleted an hour after it came; choose it again"
        raise gr.Error(text, print_exception=False) from error


def answer_to(endpoint, texts, photo: dict | None, others: Sequence[dict] = (), with_map: bool = False) -> str:
    """HTML for photos of one plant; for None, after the first photo was removed, as before there was any."""
    from evaluation.endpoint import MAX_IMAGES, SHOWN

    if photo is None:
        return texts.start()
    if len(others) >= MAX_IMAGES:
        return texts.refusal(f"{1 + len(others)} photos are too many; at most {MAX_IMAGES} of one plant are used")
    try:
        found = endpoint.predict([photo, *others])
        if isinstance(found, str):
            return texts.refusal(found)
        opened = find_readable([photo, *others]) if found.unreadable else photo
        looked = endpoint.explain(opened, found) if with_map else None
        picture = (encode(looked[0]), looked[1]) if looked else None
        photos = len({each["bytes"] for each in (photo, *others)})  # copies count once
        return texts.answer(found, SHOWN, draw_small(photo) if opened is photo else "", photos, picture)
    except Exception:  # the page stays up, and an older photo's name must not stand beside this one
        logger.critical("a photo could not be classified", exc_info=True)
        return texts.refusal("There is no name for this photo, since the program failed; its own output says why")


def find_readable(photos: Sequence[dict]) -> dict:
    """The first that can be opened, of photos that have an answer: so there is one."""
    from utils.image_utils import ImageError, open_image

    for photo in photos:
        with contextlib.suppress(ImageError):  # the answer says why
            open_image(photo)
            return photo
    raise ValueError("none of these photos can be opened")


def answer_client(endpoint, images: Sequence[dict]) -> dict:
    """What /predict answers, for gradio_client."""
    import gradio as gr

    from evaluation.endpoint import Refusal

    try:
        return endpoint.answer(images)
    except Refusal as refusal:
        raise gr.Error(str(refusal), print_exception=False) from refusal


def draw_small(photo: dict) -> str:
    """The photo as the model sees it, in text for the page, if browsers do not show it: none but Safari shows HEIC."""
    from PIL import Image

    from utils.image_utils import open_image

    with Image.open(io.BytesIO(photo["bytes"])) as header:
        return "" if header.format in BROWSERS_SHOW else encode(open_image(photo, SMALL_SIDE))


def encode(image) -> str:
    """A picture as the text of a JPEG, for the page."""
    file = io.BytesIO()
    image.save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
