#!/bin/sh
# The steps of a build: `packages server|client [TORCH_INDEX]`, then `fedloom`; `assets NAME...`.
set -eu
target=/usr/local/lib/fedloom
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
if ls /wheels/*.whl >/dev/null 2>&1; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
fi
install() { python3 -m pip --python "$target/bin/python" install --quiet "$@"; }
locked() { install --require-hashes --no-deps -r "$1"; }
step=$1
shift
case $step in
packages)
    python3 -m venv --without-pip "$target"
    # Without fedloom itself, so that a change of its code does not install all of this again.
    locked "locks/$1.txt"
    # Which build of torch depends on the machine, so no lock has it; `make image-wheels` pins the one it downloads.
    if [ "$1" != client ]; then
        :
    elif [ -f /wheels/torch.txt ]; then
        locked /wheels/torch.txt
    elif [ -n "${2:-}" ]; then
        install -c constraints.txt --index-url "$2" --no-deps torch
    else
        install -c constraints.txt torch
    fi
    python3 -m pip --python "$target/bin/python" check
    # Packages bring tests of their own, and torch what one needs to build on it in C++.
    for package in matplotlib networkx numpy opacus scipy sympy torch; do
        find "$target" -type d \( -name test -o -name tests \) -path "*/site-packages/$package/*" -prune -exec rm -rf {} +
    done
    for torch in "$target"/lib/python3*/site-packages/torch; do
        [ -d "$torch" ] || continue
        rm -rf "$torch/include" "$torch/share"
        find "$torch/lib" -name "*.a" -exec rm -f {} +
        # Importing torch asks for this one program.
        find "$torch/bin" -type f ! -name torch_shm_manager -exec rm -f {} +
    done
    ;;
fedloom)
    # Its wheel is built apart, by what the lock has and not by what an index has today.
    python3 -m venv --without-pip /builder
    python3 -m pip --python /builder/bin/python install --quiet --require-hashes --no-deps -r locks/build.txt
    /builder/bin/python -m hatchling build --target wheel --directory /built
    install --no-deps --no-index /built/fedloom-*.whl
    ;;
assets)
    # By the base image's Python, which has pip, with the client's packages.
    packages=$(echo "$target"/lib/python3*/site-packages)
    FEDLOOM_CACHE=/assets PYTHONPATH=$packages python3 -m fedloom.client.assets.fetch "$@"
    chmod -R a+rX /assets
    ;;
*)
    echo "unknown step $step" >&2
    exit 2
    ;;
esac
