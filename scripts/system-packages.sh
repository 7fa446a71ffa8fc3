#!/bin/sh
# What the tests need from the system: the binaries of a PostgreSQL server, which they start themselves.
set -u
have_postgres() {
    command -v initdb >/dev/null 2>&1 || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1
}
have_postgres && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing the package postgresql for the tests" >&2
    # No cluster and no service: only the binaries are wanted.
    mkdir -p /etc/postgresql-common
    [ -e /etc/postgresql-common/createcluster.conf ] ||
        echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
    apt-get update -qq >/dev/null 2>&1
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql >/dev/null 2>&1
    have_postgres && exit 0
fi
echo "No PostgreSQL server was found: the tests that start one will be skipped. To run them too, install" >&2
echo "the package postgresql (Debian, Ubuntu: apt-get install postgresql; macOS: brew install postgresql)." >&2
