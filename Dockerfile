# docker build -t open_gem . && docker run --rm -p 127.0.0.1:8000:8000 -e OPEN_GEM_TOKEN=secret open_gem
# Any other model: mount its files, or let it be fetched once into a volume.
#   docker run … -v models:/models open_gem --model ViT-B-16 --pretrained openai
FROM python:3.11-slim

RUN useradd --create-home --uid 1000 server && mkdir /models && chown server /models
# Wheels for CPUs alone, gigabytes smaller; for graphics cards build with --build-arg INDEX=https://pypi.org/simple.
ARG INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "$INDEX" torch torchvision
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir ".[serve,transformers]"

# By its number, so that Kubernetes can tell that it is not root.
USER 1000
WORKDIR /home/server
ENV HF_HOME=/models PYTHONUNBUFFERED=1
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=15s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# uvicorn ends in order on SIGTERM, which is what docker stop sends.
ENTRYPOINT ["open-gem", "serve", "--host", "0.0.0.0", "--port", "8000"]
