# docker build -t stylize .                        the CPU program
# docker build -t stylize --build-arg EXTRA=gpu .  CUDA comes with the wheels; run it with --gpus all
FROM python:3.12-slim
ARG EXTRA=cpu
# yes: bake torchvision's ImageNet weights in (80 MB, from a download of 575 MB)
ARG IMAGENET=no
ENV STYLIZE_HOME=/opt/stylize PYTHONUNBUFFERED=1 NUMBA_CACHE_DIR=/var/cache/numba
RUN useradd --system --create-home stylize && mkdir -p /data /opt/stylize /var/cache/numba \
    && chown stylize /data /opt/stylize /var/cache/numba
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY kernels kernels
COPY export export
RUN pip install --no-cache-dir ".[${EXTRA},serve]"
WORKDIR /
USER stylize
RUN if [ "$IMAGENET" = yes ]; then python -c "from engine import Stylizer; Stylizer('imagenet', 'cpu')"; fi
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-c", \
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
# STYLIZE_TOKEN has to be set: without it the server refuses to listen at 0.0.0.0.
ENTRYPOINT ["python", "-m", "engine.serve"]
CMD ["--host", "0.0.0.0", "--data", "/data", "--log", "json"]
