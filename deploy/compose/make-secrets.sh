#!/bin/sh
# Makes random keys for compose.yaml under secrets/; those that are there stay.
set -eu
folder=$(dirname "$0")/secrets
# The containers' users are others than yours and must read the files; the folder keeps people out.
mkdir -p "$folder"
chmod 700 "$folder"
for name in client_key admin_key engine_key grafana_password; do
  if [ ! -e "$folder/$name" ]; then
    head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$folder/$name.new"
    chmod 444 "$folder/$name.new"
    mv "$folder/$name.new" "$folder/$name"
  fi
done
