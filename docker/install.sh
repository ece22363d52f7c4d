#!/bin/sh
# The steps of a build: `packages server|client [TORCH_INDEX]`, then `fedloom`; `assets NAME...`.
set -eu
target=/usr/local/lib/fedloom
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
if ls /wheels/*.whl >/dev/null 2>&1; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
fi
install() { python3 -m pip --python "$target/bin/python" install --quiet -c constraints.txt "$@"; }
step=$1
shift
case $step in
packages)
    python3 -m venv --without-pip "$target"
    if [ -n "${2:-}" ]; then
        install --index-url "$2" --no-deps torch
    fi
    # Without fedloom itself, so that a change of its code does not install all of this again.
    python3 requirements.py "$1" >packages.txt
    install -r packages.txt
    # Tests of their own, a good part of the two.
    for package in numpy scipy; do
        find "$target" -type d -name tests -path "*/site-packages/$package/*" -prune -exec rm -rf {} +
    done
    ;;
fedloom)
    install --no-deps .
    ;;
assets)
    # By the base image's Python, which has pip; this module needs nothing that is not in the tree.
    FEDLOOM_CACHE=/assets PYTHONPATH=proto:client python3 -m fedloom.client.assets "$@"
    chmod -R a+rX /assets
    ;;
*)
    echo "unknown step $step" >&2
    exit 2
    ;;
esac
