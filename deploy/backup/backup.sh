#!/usr/bin/env bash
# Backs up Flotilla's one source of truth, the Postgres ledger, into a file that restore.sh reads.
#
#   DATABASE_URL=postgres://... deploy/backup/backup.sh DIRECTORY
#
# Runs beside the live system: pg_dump reads one snapshot. Vectors and the cache are not in it: they are made again from
# the documents in Postgres; the queue is filled again from the ledger by the reconciler.
# Needs pg_dump of the server's major version or newer. Prints the file's path.
set -euo pipefail

if [ $# -ne 1 ] || [ -z "${DATABASE_URL:-}" ]; then
    echo "usage: DATABASE_URL=postgres://... $0 DIRECTORY" >&2
    exit 2
fi
umask 077 # documents of every tenant are inside
mkdir -p "$1"
file="$1/flotilla-$(date -u +%Y%m%dT%H%M%SZ).dump"
partial="$file.partial"
trap 'rm -f "$partial"' EXIT

pg_dump --dbname="$DATABASE_URL" --format=custom --no-owner --no-privileges --file="$partial"
# A dump whose table of contents cannot be read is no backup.
pg_restore --list "$partial" >/dev/null
sync "$partial"
mv "$partial" "$file"
(cd "$1" && sha256sum "$(basename "$file")" >"$(basename "$file").sha256")
echo "$file"
