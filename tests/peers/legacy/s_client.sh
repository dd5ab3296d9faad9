#!/bin/bash
# openssl s_client with frames of command 1 on its standard input. Its argument is `careless`, `careful` or `feedback`;
# see contract.py for what it is told and tells. It does not send again.
set -eu
export LC_ALL=C  # lengths are of octets

octets() { # of hex
    printf "$(printf %s "$1" | sed 's/../\\x&/g')"
}

connect() { # to port
    openssl s_client -connect "localhost:$1" -cert "$LEGACY_PEM" -key "$LEGACY_PEM" -pass env:LEGACY_PASSPHRASE \
        -CAfile "$LEGACY_CA" -verify_return_error -quiet "${2--ign_eof}" 2>/dev/null
}

frames() {
    while read -r identifier expiry priority token payload; do
        octets "$(printf '01%08x%08x%04x%s%04x' "$identifier" "$expiry" $((${#token} / 2)) "$token" "${#payload}")"
        printf %s "$payload"
    done <"$LEGACY_PUSHES"
}

case $1 in
careless)
    # Up to 16 kB are one read. What comes in several it looks at for its commands: one that begins with k is lost.
    frames >"$LEGACY_PUSHES.frames"
    connect "$LEGACY_PORT" -no_ign_eof <"$LEGACY_PUSHES.frames"
    ;;
careful)
    answer=$(frames | connect "$LEGACY_PORT" | od -An -v -tx1 | tr -d ' \n')
    token=$(awk -v identifier=$((0x${answer:4})) '$1 == identifier { print $4 }' "$LEGACY_PUSHES")
    printf '{"status":%d,"token":"%s"}\n' "0x${answer:2:2}" "$token"
    ;;
feedback)
    content=$(connect "$LEGACY_FEEDBACK_PORT" </dev/null | od -An -v -tx1 | tr -d ' \n')
    for tuple in $(fold -w 76 <<<"$content"); do  # device tokens of 32 octets
        printf '{"token":"%s","at":%d}\n' "${tuple:12}" "0x${tuple:0:8}"
    done
    ;;
esac
