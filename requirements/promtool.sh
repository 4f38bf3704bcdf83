#!/usr/bin/env bash
# Puts Prometheus' promtool where its one argument says; without root, and once only.
#
# It is on no Python index. One that is on PATH is taken; else Debian's or Ubuntu's package is
# downloaded and unpacked, not installed. Elsewhere: install Prometheus, and run this again.
set -euo pipefail

target=$(realpath -m "$1")
unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT
# apt's own user can't write here, and says so each time.
apt=(apt-get --quiet=2 -o APT::Sandbox::User=root)

# With lists of its own where the machine's are missing or old: root alone may renew those.
download_with_own_lists() {
	mkdir -p lists/partial cache/archives/partial
	apt+=(-o "Dir::State::Lists=$unpacked/lists" -o "Dir::Cache=$unpacked/cache")
	"${apt[@]}" update
	"${apt[@]}" download prometheus
}

if found=$(command -v promtool); then
	ln -sf "$found" "$target"
elif command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
	cd "$unpacked"
	"${apt[@]}" download prometheus 2>/dev/null || download_with_own_lists
	dpkg-deb --fsys-tarfile prometheus_*.deb | tar --extract ./usr/bin/promtool
	install -m 755 usr/bin/promtool "$target"
else
	echo "promtool is missing: install Prometheus, then run make setup again" >&2
	exit 1
fi
