# pyserve in a container: compiled where nvcc is, served where no compiler is.
#
#   docker build -t pyserve .                          # CUDA 13.0
#   docker build -t pyserve --build-arg CUDA=12.6.3 --build-arg TORCH_INDEX=URL .
#     for drivers that know CUDA 12 only; URL: PyTorch's package index of its builds for CUDA 12.6
#   docker run --gpus all -p 8000:8000 -v pyserve:/cache --stop-timeout 40 pyserve --model org/name
#
# Both stages are the same Ubuntu: the wheel meets the glibc, libstdc++ and Python it was built with.
# With --port, --uds or TLS the health check below looks in the wrong place: pass --no-healthcheck.
ARG CUDA=13.0.1
ARG UBUNTU=24.04
ARG TORCH_INDEX=

FROM nvidia/cuda:${CUDA}-devel-ubuntu${UBUNTU} AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/build
ENV PATH=/opt/build/bin:$PATH
# Only its headers are used here: the native code is built on torch's stable ABI.
ARG TORCH_INDEX
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} 'torch>=2.10,<2.14'
RUN pip install --no-cache-dir 'setuptools>=77' 'ninja>=1.11' 'pybind11>=2.13'
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY cuda cuda
COPY pyserve pyserve
RUN pip wheel --no-build-isolation --no-deps --wheel-dir /wheels .

FROM ubuntu:${UBUNTU}
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/pyserve \
 && useradd --create-home --uid 10001 pyserve \
 && install -d -o pyserve -g pyserve /cache
ENV PATH=/opt/pyserve/bin:$PATH
# A layer of its own, the largest by far: it brings CUDA's libraries, 13.0's where no index is named.
ARG TORCH_INDEX
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} 'torch>=2.10,<2.14'
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir /wheels/*.whl
# The driver's libraries come from the host; the base image is none of NVIDIA's, so we ask for them.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=/cache/huggingface \
    PYSERVE_CACHE=/cache/pyserve
VOLUME /cache
USER pyserve
WORKDIR /home/pyserve
EXPOSE 8000
STOPSIGNAL SIGTERM
# 503 until the model is ready: a large one may have to be downloaded first.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["python", "-m", "pyserve"]
