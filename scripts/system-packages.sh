#!/bin/sh
# What the tests need from the system: a PostgreSQL server that they start themselves.
set -eu
have_postgres() {
    command -v initdb >/dev/null 2>&1 && return 0
    ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1
}
have_postgres && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql >/dev/null
    exit 0
fi
echo "The tests start a PostgreSQL server and found none. Install it (Debian: apt-get install postgresql;" >&2
echo "macOS: brew install postgresql) and run this again." >&2
exit 1
