#!/usr/bin/env bash
# Sets up what the AArch64 kernel tests need on an x86-64 Linux machine: a compiler for aarch64-unknown-linux-gnu, a
# linker, and qemu to run the result. Prints the path of a file to source; a second run finds everything in place.
#
# usage: scripts/cross-setup.sh [DIR]      (default: ${XDG_CACHE_HOME:-~/.cache}/rushlight/aarch64)
# Exit status 3: this machine cannot have it (the reason is on standard error).
set -euo pipefail

target=aarch64-unknown-linux-gnu
dir=$(readlink -m -- "${1:-${XDG_CACHE_HOME:-$HOME/.cache}/rushlight/aarch64}")

cannot() {
    echo "$1" >&2
    exit 3
}

# Whether the compiler that `env` describes can build for the target.
compiles() {
    local std
    std=$("${RUSTC:-rustc}" --print target-libdir --target "$target" 2>/dev/null) || return 1
    compgen -G "$std/libstd-*.rlib" >/dev/null
}

# The linker with its C library, and the emulator: from the system's packages.
install_system_packages() {
    local packages=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static)
    if command -v aarch64-linux-gnu-gcc >/dev/null && command -v qemu-aarch64-static >/dev/null &&
        [ -e /usr/aarch64-linux-gnu/lib/libc.so.6 ]; then
        return
    fi
    command -v apt-get >/dev/null || cannot "no apt-get here; install by hand: ${packages[*]}"
    [ "$(id -u)" = 0 ] || cannot "not root; run once: sudo apt-get install ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get -qq update || true; apt-get -qq install -y --no-install-recommends "${packages[@]}"; } >"$dir/apt.log" 2>&1 ||
        cannot "apt-get could not install ${packages[*]} (see $dir/apt.log)"
}

# Without rustup, or where it cannot download: Debian's own newer compiler, unpacked beside the system and not
# installed. Its standard libraries for both architectures are needed, since build scripts run on this machine.
unpack_debian_compiler() {
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        cannot "rustup could not add the target $target, and there is no apt-get to get a compiler from"
    fi
    local work
    work=$(mktemp -d -- "$dir/unpack.XXXXXX")
    # shellcheck disable=SC2064  # the path of now is meant
    trap "rm -rf -- '$work'" EXIT
    mkdir -p "$work"/{lists/partial,cache/archives/partial,debs,root}
    # A private package index, so that the arm64 architecture is known here without adding it to the system.
    local apt=(-qq -o APT::Architectures::=amd64 -o APT::Architectures::=arm64 -o APT::Sandbox::User=root
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache")
    apt-get "${apt[@]}" update >"$dir/apt.log" 2>&1 || true # a source without arm64 may complain
    local driver llvm
    driver=$(apt-cache "${apt[@]}" depends libstd-rust-web-dev:amd64 2>/dev/null |
        sed -nE 's/.*(libstd-rust-web-[0-9][0-9.]*).*/\1/p' | sort -V | tail -n 1)
    [ -n "$driver" ] || cannot "rustup could not add the target $target, and no rustc-web package is known here"
    llvm=$(apt-cache "${apt[@]}" depends "$driver:amd64" | sed -nE 's/.*(libllvm[0-9]+).*/\1/p' | sort -V | tail -n 1)
    (cd "$work/debs" && apt-get "${apt[@]}" download rustc-web "$driver:amd64" \
        libstd-rust-web-dev:amd64 libstd-rust-web-dev:arm64 "$llvm:amd64" >>"$dir/apt.log" 2>&1) ||
        cannot "Debian's compiler could not be downloaded (see $dir/apt.log)"
    local package tool
    for package in "$work"/debs/*.deb; do
        dpkg-deb --extract "$package" "$work/root"
    done
    rm -rf -- "$dir/root"
    mv -- "$work/root" "$dir/root"
    for tool in rustc rustdoc; do
        cat >"$dir/$tool" <<END
#!/bin/sh
LD_LIBRARY_PATH='$dir/root/usr/lib/x86_64-linux-gnu' exec '$dir/root/usr/bin/$tool' "\$@"
END
        chmod +x "$dir/$tool"
    done
}

case "$(uname -s)-$(uname -m)" in
Linux-x86_64) ;;
*) cannot "AArch64 is emulated on x86-64 Linux only" ;;
esac
mkdir -p -- "$dir"
install_system_packages

# A compiler found by an earlier run stays; else rustup's own, else Debian's.
if [ -x "$dir/rustc" ] && RUSTC="$dir/rustc" compiles; then
    own_compiler=yes
elif compiles || { command -v rustup >/dev/null && timeout 300 rustup --quiet target add "$target" >&2 && compiles; }; then
    own_compiler=
else
    unpack_debian_compiler
    RUSTC="$dir/rustc" compiles || cannot "Debian's compiler was unpacked to $dir but does not run"
    own_compiler=yes
fi

{
    if [ -n "$own_compiler" ]; then
        printf "export RUSTC='%s/rustc' RUSTDOC='%s/rustdoc'\n" "$dir" "$dir"
    fi
    cat <<'END'
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -cpu ${QEMU_CPU_MODEL:-max} -L /usr/aarch64-linux-gnu"
END
} >"$dir/env.part"
mv -f -- "$dir/env.part" "$dir/env"
echo "$dir/env"
