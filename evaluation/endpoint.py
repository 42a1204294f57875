"""The endpoint of app.py: one to five images of one plant in, JSON out; docs/endpoint.md shows it.

    POST /predict   multipart/form-data with files named `image` -> what predict.py --json prints, and which run said it
    GET /health     whether it is ready, and which run it serves

A request that cannot be answered gets a 4xx and {"error": one sentence}. Limits are those of the web demo, which asks
the same Endpoint: uploads up to MAX_UPLOAD bytes, one answer at a time, MAX_QUEUE requests waiting for theirs.
"""

import threading
from collections.abc import Sequence

from PIL import Image

from evaluation.explain import find_parts
from evaluation.predictor import Prediction, Predictor, to_json
from runtime.run_dir import Run
from utils.logging_utils import UserError, logger
from utils.plot_utils import LEAST_DROP, blend_map

MAX_IMAGES = 5  # of one plant
MAX_UPLOAD = 20_000_000  # bytes of an image
MAX_BODY = MAX_IMAGES * MAX_UPLOAD + 100_000  # bytes of a request: the images and what is written around them
UPLOAD_S = 120  # seconds for a request's images to arrive; who sends none must not keep others waiting
MAX_QUEUE = 20  # requests; whoever sends the next one is asked to come back
SHOWN = 5  # names of an answer
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]  # of which all but POST are refused, with a sentence
HOW = "send 1 to 5 images of one plant: curl -F image=@photo.jpg ADDRESS/predict"


class Refusal(UserError):
    """Why a request has no answer, as one sentence; `status` is that of HTTP."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Endpoint:
    """A run's predictor with what identifies it, asked by one thread at a time."""

    def __init__(self, predictor: Predictor, run: Run):
        predictor.plant.num_workers = 0  # they start more slowly than five images open
        self.predictor = predictor
        self.identity = {"run": run.folder.resolve().name, "weights": run.describe_weights(), "model": run.config.model}
        self.waiting = 0  # requests of the endpoint, the one being answered included
        self.lock = threading.Lock()

    def predict(self, images: Sequence[dict]) -> Prediction | str:
        """Of one plant's images, {"bytes": contents, "path": the sender's name for it}; a str: none can be opened."""
        if not 1 <= len(images) <= MAX_IMAGES:
            raise Refusal(400, f"{len(images)} images: {HOW}")
        with self.lock:
            if len(images) == 1:
                return next(self.predictor.predict(images, SHOWN))
            return self.predictor.predict_together(images)

    def explain(self, image: dict, found: Prediction) -> tuple[Image.Image, bool]:
        """A picture of where the model looked for an answer, and whether it has no color: no single part decides."""
        with self.lock:
            shown, drops = find_parts(self.predictor.plant, image, [name for name, _ in found.likeliest])
        return blend_map(shown, drops), float(drops.max()) < LEAST_DROP

    def answer(self, images: Sequence[dict]) -> dict:
        """The JSON of an answer. Raises Refusal."""
        names = [image["path"] for image in images]
        line = to_json(names[0] if len(names) == 1 else names, self.predict(images), SHOWN)
        if "error" in line:
            raise Refusal(422, line["error"])
        return line | self.identity

    def build_routes(self, is_alone: bool) -> list:
        """For a server of Starlette or FastAPI; `is_alone`: also what stands where there is no page."""
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        async def describe(request):
            return JSONResponse({"predict": f"POST /predict: {HOW}", "health": "GET /health"} | self.identity)

        async def get_health(request):
            return JSONResponse({"ready": True} | self.identity)

        index = [Route("/", describe)] if is_alone else []
        return [Route("/predict", self._post, methods=METHODS), Route("/health", get_health)] + index

    async def _post(self, request):
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        self.waiting += 1
        try:
            return JSONResponse(await self._read_and_answer(request))
        except Refusal as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status)
        except ClientDisconnect:
            return JSONResponse({"error": "the sender left before its images had arrived"}, 400)
        except Exception:  # later requests may succeed
            logger.critical("a request could not be answered", exc_info=True)
            return JSONResponse({"error": "the program failed; its own output says why"}, 500)
        finally:
            self.waiting -= 1

    async def _read_and_answer(self, request) -> dict:
        import anyio  # a part of Starlette
        from starlette.exceptions import HTTPException

        check_request(request.method, request.headers, self.waiting)
        try:
            with anyio.fail_after(UPLOAD_S):
                form = await request.form(max_files=10 * MAX_IMAGES, max_fields=10)
        except TimeoutError as error:
            raise Refusal(408, f"the images had not arrived after {UPLOAD_S} s; send smaller ones") from error
        except HTTPException as error:
            raise Refusal(400, f"the form cannot be read ({error.detail.rstrip('.')}); {HOW}") from error
        try:
            return await anyio.to_thread.run_sync(self._answer_uploads, form.getlist("image"))
        finally:
            await form.close()

    def _answer_uploads(self, uploads: Sequence) -> dict:
        """Large uploads lie on disk until they are read here."""
        for upload in uploads:
            if isinstance(upload, str):
                raise Refusal(400, f"`image` is text, not a file; {HOW}")
            if upload.size > MAX_UPLOAD:
                raise Refusal(413, f"{upload.filename}: is above the limit of {MAX_UPLOAD:,} bytes; make it smaller")
        return self.answer([{"bytes": upload.file.read(), "path": upload.filename} for upload in uploads])


def check_request(method: str, headers, waiting: int) -> None:
    """Raises Refusal by what is known before a request's body is read."""
    if method != "POST":
        raise Refusal(405, f"{method} is of no use here; {HOW}")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        raise Refusal(415, f"only multipart/form-data is read here; {HOW}")
    length = headers.get("content-length", "")
    if not length.isdecimal() or len(length) > 15:
        raise Refusal(411, "the request does not say its length (Content-Length); send it whole, not in chunks")
    if int(length) > MAX_BODY:
        size = f"{int(length):,} bytes, above the limit of {MAX_BODY:,}"
        raise Refusal(413, f"the request has {size}; send smaller images")
    if waiting > MAX_QUEUE:
        raise Refusal(429, f"{MAX_QUEUE} requests are waiting; send this one again later")
