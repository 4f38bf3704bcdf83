#!/bin/sh
# Puts keys from files into the environment, where vLLM and vllm-rvec take them from, and runs a
# command: each file of /run/secrets that is named as a variable. Not an argument: all could read it.
set -eu
for file in "${SECRETS_DIR:-/run/secrets}"/*; do
  name=${file##*/}
  case $name in
    [!A-Z]* | *[!A-Z0-9_]*) continue ;;
  esac
  value=$(cat "$file")
  if [ -z "$value" ]; then
    echo "with-secrets.sh: $file is empty" >&2
    exit 3
  fi
  export "$name=$value"
done
unset file name value
exec "$@"
