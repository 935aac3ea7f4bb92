#!/usr/bin/env bash
# Restores a file of backup.sh into an EMPTY database. Stop producers and workers first.
#
#   DATABASE_URL=postgres://... deploy/backup/restore.sh FILE.dump
#
# It never overwrites: a database that holds tables is refused. All or nothing: one transaction. Afterwards follow
# "After a restore" in deploy/README.md, because queue, vectors and cache may know jobs and versions that the backup
# does not.
set -euo pipefail

if [ $# -ne 1 ] || [ -z "${DATABASE_URL:-}" ]; then
    echo "usage: DATABASE_URL=postgres://... $0 FILE.dump" >&2
    exit 2
fi
file=$1
if [ ! -r "$file" ]; then
    echo "restore: cannot read $file" >&2
    exit 2
fi
if [ -f "$file.sha256" ]; then
    (cd "$(dirname "$file")" && sha256sum --check --quiet "$(basename "$file").sha256")
else
    echo "restore: $file.sha256 is missing, so the file is not verified" >&2
fi

# Tables that belong to extensions do not count.
tables=$(psql "$DATABASE_URL" --no-psqlrc --tuples-only --no-align --command="
    SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'p') AND n.nspname NOT IN ('pg_catalog', 'information_schema')
      AND n.nspname NOT LIKE 'pg\_toast%'
      AND NOT EXISTS (SELECT 1 FROM pg_depend d WHERE d.objid = c.oid AND d.deptype = 'e')")
if [ "$tables" -ne 0 ]; then
    echo "restore: the database holds $tables tables; restore into an empty one (createdb), then point DATABASE_URL at it" >&2
    exit 1
fi

pg_restore --dbname="$DATABASE_URL" --no-owner --no-privileges --exit-on-error --single-transaction "$file"
# Cursors of events count the transactions of the cluster that was lost. They end, so that their readers begin again.
can_end=$(psql "$DATABASE_URL" --no-psqlrc --tuples-only --no-align \
    --command="SELECT to_regprocedure('flotilla.after_restore()') IS NOT NULL")
if [ "$can_end" = t ]; then
    psql "$DATABASE_URL" --no-psqlrc --quiet --tuples-only --output=/dev/null --set=ON_ERROR_STOP=1 \
        --command="SELECT flotilla.after_restore()"
else
    echo "restore: the backup is from before flotilla.after_restore(): call it after 'flotilla migrate up'" >&2
fi
# The planner knows nothing about restored tables.
psql "$DATABASE_URL" --no-psqlrc --quiet --command=ANALYZE
echo "restored $file"
