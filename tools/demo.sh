#!/bin/sh
# Sets up .venv and compiles a committed reference model: a trained MobileNetV2-style classifier of digits.
set -eu
cd "$(dirname "$0")/.."
python3 -m venv .venv
.venv/bin/python -m pip install --quiet --editable '.[cpu]'
exec .venv/bin/qexport tests/models/mobilenet.safetensors --factory tools.models:mobilenet \
    --calib tests/models/digits.safetensors --passes cle,gptaq --target onnx \
    --gate 'sqnr_db>=34' --gate 'top1_agreement>=0.99' --out out --force
