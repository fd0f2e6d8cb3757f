# The runtime of the scripts, for CPUs and, under the NVIDIA container runtime, GPUs: torch's wheel brings its own CUDA.
# Not built by any test. Data and runs belong into volumes:
#     docker build -t dalle2-video .
#     docker run --gpus all --ipc host -v /data:/data -v "$PWD/runs:/app/runs" dalle2-video python train_clip.py ...
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt

COPY LICENSE README.md pyproject.toml preprocess.py train_clip.py train_prior.py train_decoder.py sample.py evaluate.py \
    demo.py ./
COPY configs ./configs
COPY dalle2_video ./dalle2_video

RUN useradd --create-home --uid 1000 user && mkdir runs && chown user runs .
USER user
ENV PYTHONUNBUFFERED=1
CMD ["python", "demo.py", "--help"]
