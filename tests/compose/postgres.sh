#!/bin/sh
# Makes the database if the volume is empty, as the image `postgres` does, and serves it.
set -eu
data=/var/lib/postgresql/data
chown postgres "$data"
as() { setpriv --reuid postgres --regid postgres --init-groups "$@"; }
if [ ! -e "$data/PG_VERSION" ]; then
    password=$(mktemp)
    echo "$POSTGRES_PASSWORD" >"$password"
    chown postgres "$password"
    as initdb --pgdata="$data" --username="$POSTGRES_USER" --pwfile="$password" --auth=scram-sha-256 >/dev/null
    rm "$password"
    echo "host all all all scram-sha-256" >>"$data/pg_hba.conf"
    echo "local all all trust" >"$data/pg_hba.new"
    cat "$data/pg_hba.conf" >>"$data/pg_hba.new"
    mv "$data/pg_hba.new" "$data/pg_hba.conf"
    chown postgres "$data/pg_hba.conf"
    as pg_ctl --pgdata="$data" --options="-c listen_addresses=" --wait start >/dev/null
    as createdb --username="$POSTGRES_USER" "$POSTGRES_DB"
    as pg_ctl --pgdata="$data" --wait stop >/dev/null
fi
exec setpriv --reuid postgres --regid postgres --init-groups postgres -D "$data" -c listen_addresses='*'
