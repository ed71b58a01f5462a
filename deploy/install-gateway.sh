#!/bin/sh
# Installs the gateway on 64-bit Raspberry Pi OS (or any Debian 12 or later): docs/enrolment.md.
#
#   sudo sh install-gateway.sh WHEEL [--wheels DIR]
#
# WHEEL is citybrain_senses-*.whl; requirements/pi.lock and deploy/systemd are taken from beside this script. With
# --wheels DIR nothing is fetched: DIR holds the wheels that pi.lock names. It may be run again, to repair or to update;
# what a run does is the same whatever was there before. It touches /opt/citybrain, /var/lib/citybrain, three units,
# /usr/local/bin/citybrain-gateway, the journal's settings, and the user `citybrain`. For an image run it in a chroot. With DESTDIR it installs below that folder and leaves users and
# services alone: a rehearsal.
set -eu
umask 022 # root's may be narrower, and the user `citybrain` must read what is installed

DESTDIR="${DESTDIR:-}"
HERE=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
LOCK="${LOCK:-$HERE/../requirements/pi.lock}"
UNITS="$HERE/systemd"
OPT="$DESTDIR/opt/citybrain"
STATE="$DESTDIR/var/lib/citybrain"
SYSTEMD="$DESTDIR/etc/systemd/system"
BIN="$DESTDIR/usr/local/bin"
JOURNAL="$DESTDIR/etc/systemd/journald.conf.d"
PYTHON="${PYTHON:-python3}"

refuse() {
    echo "install-gateway: $1" >&2
    exit "${2:-1}"
}

usage() {
    refuse "usage: install-gateway.sh WHEEL [--wheels DIR]" 2
}

check_system() {
    [ -n "$DESTDIR" ] || [ "$(id -u)" -eq 0 ] || refuse "run it as root: sudo sh $0 $WHEEL"
    bits=$(getconf LONG_BIT)
    [ "$bits" = 64 ] || refuse "this system is $bits-bit; 64-bit Raspberry Pi OS is needed"
    command -v "$PYTHON" >/dev/null 2>&1 || refuse "$PYTHON is missing: apt-get install python3 python3-venv"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        refuse "$PYTHON is $("$PYTHON" -V 2>&1); 3.11 or later is needed (Raspberry Pi OS bookworm has it)"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || refuse "venv is missing: apt-get install python3-venv"
    for path in "$WHEEL" "$LOCK" "$UNITS/citybrain-gateway.service"; do
        [ -f "$path" ] || refuse "$path: no such file"
    done
    place=${DESTDIR:-/}
    [ -d "$place" ] || place=/
    free_kb=$(df -Pk "$place" | awk 'NR == 2 { print $4 }')
    [ "$free_kb" -ge 200000 ] || refuse "only $free_kb KiB are free; 200 MB are needed"
}

make_user() {
    [ -z "$DESTDIR" ] || return 0
    id citybrain >/dev/null 2>&1 ||
        useradd --system --home-dir /var/lib/citybrain --no-create-home --shell /usr/sbin/nologin citybrain
    for group in dialout video i2c spi; do
        if getent group "$group" >/dev/null; then
            usermod -a -G "$group" citybrain
        fi
    done
}

# One run at a time: the kernel lets go of the lock however that run ends.
lock() {
    mkdir -p "$OPT"
    exec 9>"$OPT/.lock"
    flock -n 9 || refuse "another run of it is at work here"
}

# What earlier runs left that were cut off: each is as large as the program.
clear_remains() {
    before=$(readlink "$OPT/venv" || true)
    for one in "$OPT"/venv-*; do
        if [ -d "$one" ] && [ "$(basename "$one")" != "$before" ]; then
            rm -rf "$one"
        fi
    done
}

# Into a folder of its own, then one rename of a link: a run that is cut off leaves the version that was there. All of it
# is on the disk before the link leads to it, and the link before the old one goes: the power may be cut as well.
install_program() {
    clear_remains
    version=$(basename "$WHEEL" | cut -d- -f2)
    made="$OPT/venv-$version-$(date +%s)"
    "$PYTHON" -m venv "$made"
    set -- --quiet --no-cache-dir --disable-pip-version-check
    [ -z "$WHEELS" ] || set -- "$@" --no-index --find-links "$WHEELS"
    if ! "$made/bin/pip" install "$@" --require-hashes -r "$LOCK" ||
        ! "$made/bin/pip" install "$@" --no-deps "$WHEEL" ||
        ! "$made/bin/citybrain" gateway --help >/dev/null; then
        rm -rf "$made"
        refuse "the program could not be installed; what was there before is still there"
    fi
    sync -f "$OPT"
    ln -sfn "$(basename "$made")" "$OPT/.venv.new"
    mv -T "$OPT/.venv.new" "$OPT/venv"
    sync -f "$OPT"
    clear_remains
}

# `systemctl help citybrain-gateway`, and whoever stands at the box without a network.
install_docs() {
    [ -d "$HERE/../docs" ] || return 0
    rm -rf "$OPT/docs.new"
    cp -R "$HERE/../docs" "$OPT/docs.new"
    rm -rf "$OPT/docs"
    mv -T "$OPT/docs.new" "$OPT/docs"
}

# A file is there whole or as it was before.
put() {
    install -m 0644 "$1" "$2.new"
    mv -T "$2.new" "$2"
}

# What a technician types: the box's own program, as the box's user, on the box's folder.
install_command() {
    mkdir -p "$BIN"
    cat >"$OPT/.command" <<'END'
#!/bin/sh
# `citybrain-gateway status`: `citybrain gateway status` of this box, as the user it runs as.
exec sudo -u citybrain /opt/citybrain/venv/bin/citybrain gateway "$@" --data /var/lib/citybrain
END
    install -m 0755 "$OPT/.command" "$BIN/citybrain-gateway.new"
    mv -T "$BIN/citybrain-gateway.new" "$BIN/citybrain-gateway"
    rm "$OPT/.command"
}

install_state() {
    mkdir -p "$STATE"
    chmod 0700 "$STATE"
    [ -n "$DESTDIR" ] || chown citybrain:citybrain "$STATE"
}

# A card wears out by writing: the journal goes to memory, at most 32 MB of it. The spool syncs by itself.
install_units() {
    mkdir -p "$SYSTEMD" "$JOURNAL"
    for unit in citybrain-gateway.service citybrain-gateway-renew.service citybrain-gateway-renew.timer; do
        put "$UNITS/$unit" "$SYSTEMD/$unit"
    done
    printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=32M\n' >"$OPT/.journal"
    put "$OPT/.journal" "$JOURNAL/citybrain.conf"
    rm "$OPT/.journal"
    sync -f "$SYSTEMD"
    [ -z "$DESTDIR" ] || return 0
    systemctl daemon-reload
    systemctl try-restart systemd-journald.service
    systemctl enable --quiet citybrain-gateway.service citybrain-gateway-renew.timer
    systemctl start citybrain-gateway-renew.timer
    if [ -f "$STATE/gateway.yaml" ]; then
        systemctl restart citybrain-gateway.service
    fi
}

say_what_next() {
    if [ -f "$STATE/gateway.yaml" ]; then
        echo "installed; it is enrolled; how it is: citybrain-gateway doctor"
        return
    fi
    echo "installed; enrol it now, with what the QR code says:"
    echo "  citybrain-gateway enrol --qr-text 'https://…'"
    echo "  sudo systemctl start citybrain-gateway"
}

WHEEL=""
WHEELS=""
while [ $# -gt 0 ]; do
    case "$1" in
    --wheels)
        [ $# -ge 2 ] || usage
        WHEELS=$2
        shift
        ;;
    -*) usage ;;
    *)
        [ -z "$WHEEL" ] || usage
        WHEEL=$1
        ;;
    esac
    shift
done
[ -n "$WHEEL" ] || usage

check_system
lock
make_user
install_program
install_docs
install_command
install_state
install_units
say_what_next
