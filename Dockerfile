# Serves the page of a run: docs/docker.md.
#     docker build -t llava-plants .                               for CPUs
#     docker build -t llava-plants --build-arg DEVICE=cuda .       for NVIDIA GPUs, with torch's CUDA libraries
FROM python:3.12-slim-bookworm

ARG DEVICE=cpu
WORKDIR /app
COPY requirements.txt requirements-app.txt requirements.lock ./
# torch's index has a build without CUDA's 3 GB of libraries, which pip prefers to the one of the same version on PyPI.
RUN if [ "$DEVICE" = cpu ]; then export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; fi \
    && pip install --no-cache-dir --disable-pip-version-check -r requirements-app.txt -c requirements.lock \
    && useradd --uid 1000 --home-dir /cache --create-home plants && chmod 1777 /cache
COPY . .

# Whatever is written goes to /cache, by any user: the hub's files, uploads, settings. All else can be read-only.
ENV HOME=/cache HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache TMPDIR=/cache PYTHONDONTWRITEBYTECODE=1
USER 1000
VOLUME /cache
EXPOSE 7860
HEALTHCHECK --start-period=10m --interval=30s --timeout=10s CMD ["python", "-c", \
    "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:7860/health', timeout=5)"]
ENTRYPOINT ["python", "app.py", "--host", "0.0.0.0"]
CMD ["/srv/run"]
