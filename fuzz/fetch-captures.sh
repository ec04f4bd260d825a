#!/bin/sh
# fuzz/fetch-captures.sh: captures that come with the sources of Debian's tcpdump and wireshark, as further seeds.
# About 50 MB are fetched; fuzz/found/captures/ keeps the captures (not committed), fuzz/found/TARGET/ the seeds made of them.
set -eu
cd "$(dirname "$0")"
captures=$PWD/found/captures
mkdir -p "$captures"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

release=$(. /etc/os-release && echo "$VERSION_CODENAME")
key=/usr/share/keyrings/debian-archive-keyring.gpg
[ -e "$key" ] || { echo "$key is missing: this works on Debian (apt install debian-archive-keyring)" >&2; exit 1; }
mkdir -p "$work/lists/partial" "$work/cache" "$work/sources"
echo "deb-src [signed-by=$key] http://deb.debian.org/debian $release main" > "$work/sources.list"
# Lists and cache of its own: the host's are left as they are, and no privileges are needed.
apt() {
    apt-get -qq -o APT::Sandbox::User=root -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" "$@"
}
apt update
(cd "$work/sources" && apt source --download-only tcpdump wireshark > /dev/null)
for archive in "$work"/sources/*.orig.tar.*; do
    case $archive in *.asc) continue ;; esac
    name=$(basename "$archive" | sed 's/_.*//')
    mkdir -p "$work/$name" "$captures/$name"
    tar -tf "$archive" | grep -E '\.(pcap|pcapng|cap|ntar)$' > "$work/list"
    tar -xf "$archive" -C "$work/$name" -T "$work/list"
    find "$work/$name" -type f -exec cp -t "$captures/$name" {} +
done
echo "$(find "$captures" -type f | wc -l) captures in fuzz/found/captures"
cargo run --locked --quiet --example seeds -- "$captures"
