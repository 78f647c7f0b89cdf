#!/bin/sh
# The endpoint as a shell script (CGI): any program that can print three lines can hand over. It asks the same of
# everybody; what a client sends must never come into the JSON unescaped.
printf 'X-Socket-Handoff: %s\n' "${FORKD_SOCKET:-/run/forkd/forkd.sock}"
printf 'X-Handoff-Data: {"prompt":"What is new?","user_id":"%s"}\n' "$(id -u)"
printf 'Content-Type: text/plain\n\n'
