# docker build -t emogen . ; docker run -p 8000:8000 -v ./runs:/runs:ro -e EMOGEN_API_KEY=... emogen /runs/demo
# A server on the CPU. torch first, from its own index: the one on PyPI brings gigabytes of CUDA.
FROM python:3.11-slim
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch==' constraints.txt)"
COPY emogen ./emogen
COPY prompts ./prompts
COPY recipes ./recipes
COPY sample ./sample
RUN pip install --no-cache-dir --constraint constraints.txt '.[serve]'
RUN useradd --create-home emogen
USER emogen
EXPOSE 8000
ENTRYPOINT ["emogen", "serve", "--host", "0.0.0.0"]
